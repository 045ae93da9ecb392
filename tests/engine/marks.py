"""What a machine must have for a test."""

from __future__ import annotations

import os

import pytest

from modelyard.engine.build import computes_bfloat16

BF16 = pytest.mark.skipif(not computes_bfloat16(), reason="this CPU has no bfloat16 products")
DEVICE = os.environ.get("MODELYARD_TEST_DEVICE", "cpu")
"""What the engine's tests run on: see conftest."""

CPU = pytest.mark.skipif(DEVICE != "cpu", reason="of the CPU's backend")
