"""Ray Serve application around the engine: an OpenAI-compatible HTTP API, replicas and autoscaling.

`api` builds the HTTP application over a `Backend` and knows nothing of Ray; `ingress` and `replicas` hold Serve's
deployments, `app` puts them together, and `server` starts and stops them. The ingress never imports torch.
May import engine, storage, errors, monitor and recipe options; is imported by stages and the command line.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modelyard.serving.options import Autoscaling, ServeOptions
    from modelyard.serving.server import ServerHandle, launch, shutdown

_HOME = {
    "Autoscaling": "options",
    "ServeOptions": "options",
    "ServerHandle": "server",
    "launch": "server",
    "shutdown": "server",
}

__all__ = ["Autoscaling", "ServeOptions", "ServerHandle", "launch", "shutdown"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
