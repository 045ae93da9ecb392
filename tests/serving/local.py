"""The HTTP application under uvicorn in a thread, with an engine in this process."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import uvicorn
from asking import wait_for

from modelyard.engine import EngineOptions, NativeEngine, Tokenizer
from modelyard.serving.api import build_app
from modelyard.serving.backend import LocalBackend
from modelyard.serving.background import Background
from modelyard.serving.feedback import FeedbackStore
from modelyard.serving.metrics import Metrics
from modelyard.serving.service import Service
from modelyard.serving.warm import warm_up


@cache
def _compiled(folder: Path) -> None:
    """Compiles the kernels, which takes longer on a busy machine than an answer may, in an engine no test looks at."""
    options = EngineOptions(max_sequences=4, threads=1)
    engine = NativeEngine(folder, options)
    warm_up(engine, options)
    engine.close()


class LocalServer:
    """`url` answers from construction until :meth:`stop`."""

    def __init__(
        self,
        folder: Path,
        options: EngineOptions | None = None,
        keys: Mapping[str, str] | None = None,
        timeout: float = 60.0,
        *,
        feedback: FeedbackStore | None = None,
        adapters: Mapping[str, str] | None = None,
        max_adapters: int = 8,
        tasks: Background | None = None,
        **service: Any,
    ) -> None:
        self.feedback = feedback
        _compiled(folder)
        self.engine = NativeEngine(folder, options or EngineOptions(max_sequences=4, max_waiting=8, threads=1))
        self.service = Service(
            "tiny",
            Tokenizer(folder),
            LocalBackend(self.engine, adapters, max_adapters),
            max_length=self.engine.max_length,
            max_choices=8,
            timeout=timeout,
            metrics=Metrics(),
            adapters=tuple(adapters or ()),
            **service,
        )
        app = build_app(self.service, keys=keys, max_body=100_000, feedback=feedback, tasks=tasks)
        bound = socket.socket()
        bound.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        # A connection is never closed for its idleness, or a client might use it at that very moment.
        config = uvicorn.Config(app, log_level="warning", timeout_keep_alive=3600)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([bound],), daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)

    def idle(self) -> bool:
        """Waits until the engine has nothing to do; whether its books are in order then."""
        wait_for(lambda: (s := self.engine.stats()).running == s.waiting == 0, "an idle engine", every=0.01)
        return self.engine.invariants() == []

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join()
        self.engine.close()
