"""The HTTP application under uvicorn in a thread, with an engine in this process."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import uvicorn

from modelyard.engine import EngineOptions, NativeEngine, Tokenizer
from modelyard.serving.api import build_app
from modelyard.serving.backend import LocalBackend
from modelyard.serving.background import Background
from modelyard.serving.feedback import FeedbackStore
from modelyard.serving.metrics import Metrics
from modelyard.serving.server import free_port
from modelyard.serving.service import Service


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
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning"))
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)

    def idle(self) -> bool:
        """Waits up to 5 s until the engine has nothing to do; whether it got there with its books in order."""
        for _ in range(500):
            stats = self.engine.stats()
            if stats.running == 0 and stats.waiting == 0:
                return self.engine.invariants() == []
            time.sleep(0.01)
        return False

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join()
        self.engine.close()
