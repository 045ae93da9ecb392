"""A reward function in a process of its own: one JSON line a call, a time-out, a new process after one that hangs.

`python -m modelyard.align.function_process package.module:function` is the other end. The function gets
(prompt, completion, row) and returns a number. Nothing is pickled. The process is no sandbox against malice: name only
functions you trust, as with any import path.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from modelyard.errors import RecipeError

_START_SECONDS = 120.0


class FunctionFailed(Exception):
    """The function raised, returned no finite number, ran out of time or died."""


class FunctionProcess:
    """Calls `path` for one answer at a time.

    Args:
        path: package.module:function.
        timeout: seconds a call may take.

    Raises:
        RecipeError: it cannot be imported.
    """

    def __init__(self, path: str, timeout: float) -> None:
        self._path, self._timeout = path, timeout
        self._process: subprocess.Popen[bytes] | None = None
        self._rest = b""
        self._start()

    def __call__(self, prompt: str, completion: str, row: Mapping[str, Any]) -> float:
        """The reward. Raises FunctionFailed."""
        if self._process is None or self._process.poll() is not None:
            self._start()
        assert self._process is not None
        assert self._process.stdin is not None
        message = json.dumps({"prompt": prompt, "completion": completion, "row": dict(row)}, default=str) + "\n"
        try:
            self._process.stdin.write(message.encode())
            self._process.stdin.flush()
            found = self._read(self._timeout)
        except TimeoutError as error:  # an OSError too
            self.close()
            raise FunctionFailed(f"{self._path} took longer than {self._timeout:g} s") from error
        except (OSError, EOFError) as error:
            self.close()
            raise FunctionFailed(f"{self._path} ended its process") from error
        if "error" in found:
            raise FunctionFailed(f"{self._path} raised {found['error']}")
        return float(found["reward"])

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _start(self) -> None:
        # What can be imported here can be imported there.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        command = [sys.executable, "-m", "modelyard.align.function_process", self._path]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True
        )
        self._rest = b""
        try:
            ready = self._read(_START_SECONDS)
        except (EOFError, TimeoutError):
            ready = {"error": "its process did not start"}
        if "error" in ready:
            self.close()
            raise RecipeError(
                f"the reward function {self._path} cannot be used: {ready['error']}",
                place="rollouts.rewards",
                mend="install its module for the workers too, and write package.module:function",
            )

    def _read(self, seconds: float) -> dict[str, Any]:
        """The next line. Raises TimeoutError or EOFError."""
        import time

        assert self._process is not None
        assert self._process.stdout is not None
        end, source = time.monotonic() + seconds, self._process.stdout.fileno()
        with selectors.DefaultSelector() as selector:
            selector.register(source, selectors.EVENT_READ)
            while b"\n" not in self._rest:
                left = end - time.monotonic()
                if left <= 0 or not selector.select(left):
                    raise TimeoutError
                piece = os.read(source, 65536)
                if not piece:
                    raise EOFError
                self._rest += piece
        line, _, self._rest = self._rest.partition(b"\n")
        found: dict[str, Any] = json.loads(line)
        return found


def main() -> None:
    """The other end. Whatever the function prints goes to standard error, so that it cannot spoil an answer."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    module, _, name = sys.argv[1].partition(":")
    try:
        function = getattr(import_module(module), name)
    except Exception as error:  # anything a user's module does at import
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=answers)
        return
    print(json.dumps({"ready": True}), file=answers)
    for line in sys.stdin:
        call = json.loads(line)
        try:
            found: dict[str, Any] = {"reward": float(function(call["prompt"], call["completion"], call["row"]))}
        except Exception as error:  # reported to the run, which counts it
            found = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(found), file=answers)


if __name__ == "__main__":
    main()
