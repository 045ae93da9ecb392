"""What the parts of a served model are called in Ray Serve."""

from __future__ import annotations

APPLICATION = "modelyard"
INGRESS = "ingress"


def engine_name(version: str) -> str:
    """Name of the Serve deployment that computes a version."""
    safe = "".join(c if c.isalnum() or c in "-_." else "-" for c in version)
    return f"engine-{safe}" if safe else "engine"
