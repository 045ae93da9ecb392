"""What a machine must have for a test."""

from __future__ import annotations

import pytest

from modelyard.engine.build import computes_bfloat16

BF16 = pytest.mark.skipif(not computes_bfloat16(), reason="this CPU has no bfloat16 products")
