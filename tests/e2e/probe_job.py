"""A job like those in jobs/, which prints as JSON where driver and worker find `platform` and `modelyard`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "platform"))

import json
import platform

import ray

import modelyard
from modelyard.stages import session


def places() -> dict[str, str]:
    """Files of the two packages, and a value only the standard library's `platform` has."""
    return {"platform": str(platform.__file__), "modelyard": str(modelyard.__file__), "system": platform.system()}


if __name__ == "__main__":
    session.start(1)
    worker = ray.get(ray.remote(num_cpus=1)(places).remote())
    print("PROBE " + json.dumps({"driver": places(), "worker": worker}))
