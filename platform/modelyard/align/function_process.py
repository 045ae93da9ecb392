"""A user's function in a process of its own: one JSON line a call, a time-out, a new process after one that hangs.

`python -m modelyard.align.function_process package.module:function` is the other end. A reward function gets
(prompt, completion, row) and returns a number; what an environment is, `EnvironmentOptions` says. Nothing is pickled.
The process is no sandbox against malice: name only functions you trust, as with any import path.
"""

from __future__ import annotations

import json
import math
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
        place: where the recipe names it.

    Raises:
        RecipeError: it cannot be imported.
    """

    def __init__(self, path: str, timeout: float, place: str = "rollouts.rewards") -> None:
        self._path, self._timeout, self._place = path, timeout, place
        self._process: subprocess.Popen[bytes] | None = None
        self._rest = b""
        self.is_class = False
        """Whether the path names a class."""
        self._start()

    def __call__(self, prompt: str, completion: str, row: Mapping[str, Any]) -> float:
        """The reward. Raises FunctionFailed."""
        return float(self.call({"prompt": prompt, "completion": completion, "row": dict(row)})["reward"])

    def call(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """What the other end says to a message. Raises FunctionFailed."""
        if self._process is None or self._process.poll() is not None:
            self._start()
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write((json.dumps(message, default=str) + "\n").encode())
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
        return found

    def close(self) -> None:
        """Ends the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

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
                f"the function {self._path} cannot be used: {ready['error']}",
                place=self._place,
                mend="install its module for the workers too, and write package.module:function",
            )
        self.is_class = bool(ready["class"])

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


class _Episodes:
    """An environment: a function that is asked anew each turn, or a class of which every episode has an object."""

    def __init__(self, target: Any) -> None:
        self._target = target
        self._live: dict[str, Any] = {}

    def __call__(self, call: Mapping[str, Any]) -> dict[str, Any]:
        if not isinstance(self._target, type):
            return _told(self._target(call["prompt"], call["completion"], call["row"]), False, 0.0)
        name = call["episode"]
        if "completion" not in call:
            return {"prompt": self._reset(name, call["row"])}
        if name not in self._live and call["first"]:
            self._reset(name, call["row"])  # the process has ended since
        if name not in self._live:
            raise RuntimeError("nothing: an earlier call ended the process, and with it the episode's state")
        observation, done, reward = self._live[name].step(call["completion"])
        if done or observation is None or call["last"]:
            del self._live[name]
        return _told(observation, done, reward)

    def _reset(self, name: str, row: Mapping[str, Any]) -> Any:
        self._live[name] = self._target()
        return self._live[name].reset(row)


def _told(observation: Any, done: bool, reward: Any) -> dict[str, Any]:
    if observation is not None and not isinstance(observation, str):
        raise TypeError(f"an observation is text or None, not {type(observation).__name__}")
    if not math.isfinite(float(reward)):
        raise ValueError(f"the reward is {reward}")
    return {"observation": None if done else observation, "reward": float(reward)}


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
    print(json.dumps({"class": isinstance(function, type)}), file=answers)
    episodes = _Episodes(function)
    for line in sys.stdin:
        call = json.loads(line)
        try:
            if "episode" in call:
                found: dict[str, Any] = episodes(call)
            else:
                found = {"reward": float(function(call["prompt"], call["completion"], call["row"]))}
        except Exception as error:  # reported to the run, which counts it
            found = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(found), file=answers)


if __name__ == "__main__":
    main()
