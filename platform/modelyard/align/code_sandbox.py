"""Runs the code of an answer and a record's tests where it can do no harm: a reward by execution.

This file is both ends. The child is a bare Python (`python -I`, an empty environment) that confines itself before it
runs anything: Landlock takes away every write, every file but Python's own, and TCP; a network namespace, where the
system lets ordinary users have one, the rest of the network; limits bound memory, CPU seconds and processes. It then
says a word it was told in private: code that merely ends early, or prints, has not passed. (A policy that searched the
frames of its caller for that word could cheat; it could not break out.)
"""

import contextlib
import ctypes
import json
import os
import re
import resource
import secrets
import signal
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

_FENCE = re.compile(r"```[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)
_CREATE, _ADD, _RESTRICT = 444, 445, 446
"""Landlock's system calls, the same numbers on x86-64 and arm64."""
_READ = 0b1100
"""LANDLOCK_ACCESS_FS_READ_FILE and _READ_DIR."""
_NEWUSER, _NEWNET, _NO_NEW_PRIVILEGES = 0x10000000, 0x40000000, 38
_START_SECONDS = 10.0


def can_confine() -> bool:
    """Whether this system has Landlock (Linux from 5.13, where it is switched on)."""
    return _landlock_version() > 0


def program(text: str) -> str:
    """The code of an answer: its last fenced block, or all of it."""
    blocks = _FENCE.findall(text)
    return str(blocks[-1]) if blocks else text


def passes(text: str, tests: Any, timeout: float, memory: int) -> bool:
    """Whether the tests run through after the answer's code.

    Args:
        text: the answer.
        tests: Python that raises where the code is wrong, a text or a list of them.
        timeout: CPU seconds of both; of wall time some more.
        memory: bytes of the process.
    """
    word = secrets.token_hex(16)
    checks = "\n".join(map(str, tests)) if isinstance(tests, list) else str(tests)
    job = {"code": program(text), "tests": checks, "word": word, "cpu": timeout, "memory": memory}
    child = subprocess.Popen(
        [sys.executable, "-I", "-B", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, env={}, cwd="/", start_new_session=True,
    )  # fmt: skip
    try:
        said, _ = child.communicate(json.dumps(job).encode(), timeout=2 * timeout + _START_SECONDS)
    except subprocess.TimeoutExpired:
        return False
    finally:
        _end(child)
    return said == word.encode()


def _end(child: subprocess.Popen[bytes]) -> None:
    """Ends the child and what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _landlock_version() -> int:
    return int(ctypes.CDLL(None).syscall(_CREATE, None, 0, 1)) if sys.platform == "linux" else 0


def _confine(cpu: float, memory: int) -> None:
    """Gives up, for good, what code needs no more than Python for. Raises OSError when that cannot be done."""
    libc = ctypes.CDLL(None, use_errno=True)
    seconds = int(cpu) + 1
    for what, most in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(what, (most, most))
    libc.unshare(_NEWUSER | _NEWNET)  # Refused on some systems: TCP is Landlock's.
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    version = _landlock_version()
    rights = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    words = (ctypes.c_uint64 * 3)(rights, 0b11 if version >= 4 else 0, 0b11 if version >= 6 else 0)
    rules = libc.syscall(_CREATE, ctypes.byref(words), 24 if version >= 6 else 16 if version >= 4 else 8, 0)
    for place in {sys.prefix, sys.base_prefix, "/usr", "/lib", "/lib64"}:
        if rules >= 0 and os.path.isdir(place):
            folder = os.open(place, os.O_PATH)
            rule = _READ.to_bytes(8, sys.byteorder) + folder.to_bytes(4, sys.byteorder)
            libc.syscall(_ADD, rules, 1, rule, 0)
            os.close(folder)
    if rules < 0 or libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) or libc.syscall(_RESTRICT, rules, 0):
        raise OSError(ctypes.get_errno(), "the process cannot be confined")
    os.close(rules)


def _child(job: Mapping[str, Any], answer: int) -> None:
    _confine(job["cpu"], job["memory"])
    space: dict[str, Any] = {"__name__": "__answer__"}
    exec(compile(job["code"], "answer", "exec"), space)  # noqa: S102 - what this process is for
    exec(compile(job["tests"], "tests", "exec"), space)  # noqa: S102
    os.write(answer, job["word"].encode())


if __name__ == "__main__":
    spoken = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    request = json.loads(sys.stdin.buffer.read())
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    _child(request, spoken)
    os._exit(0)
