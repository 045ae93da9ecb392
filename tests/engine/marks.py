"""What a machine must have for a test."""

from __future__ import annotations

import os

import pytest

DEVICE = os.environ.get("MODELYARD_TEST_DEVICE", "cpu")
"""What the engine's tests run on: see conftest."""

CPU = pytest.mark.skipif(DEVICE != "cpu", reason="of the CPU's backend")
