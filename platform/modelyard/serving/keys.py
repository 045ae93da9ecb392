"""API keys: random, shown once, kept as SHA-256 digests.

    python -m modelyard.serving.keys add keys.txt alice

appends `alice sha256:...` to keys.txt and prints the key. A key has 256 random bits, so a plain digest cannot
be reversed by guessing and needs no slow hash.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path

from modelyard.errors import DataError, RecipeError

_LINE = re.compile(r"^(?P<name>[A-Za-z0-9_.@-]{1,64}) sha256:(?P<digest>[0-9a-f]{64})$")


def digest(key: str) -> str:
    """Hex SHA-256 of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


def new_key() -> str:
    """A fresh random key."""
    return "my-" + secrets.token_urlsafe(32)


def add_key(file: Path, name: str) -> str:
    """Makes a key for `name`, appends its digest to `file` (mode 0600) and returns the key.

    Raises RecipeError when `name` is not a key name.
    """
    key = new_key()
    line = f"{name} sha256:{digest(key)}"
    if not _LINE.match(line):
        raise RecipeError(f"{name!r} is not a key name", mend="use letters, digits and _.@-, at most 64")
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "a") as handle:
        handle.write(line + "\n")
    return key


def read_keys(file: Path) -> dict[str, str]:
    """Digest -> name of every key in a file; blank lines and lines with # are skipped.

    Raises DataError when the file is missing, empty, or holds something that is not a digest.
    """
    mend = f"make one: python -m modelyard.serving.keys add {file} NAME"
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"cannot read the API keys: {error}", place=str(file), mend=mend) from error
    keys: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _LINE.match(line.strip())
        if match is None:
            raise DataError("this line is not `name sha256:digest`", place=f"{file}:{number}", mend=mend)
        keys[match["digest"]] = match["name"]
    if not keys:
        raise DataError("the file holds no API key", place=str(file), mend=mend)
    return keys


def holder(keys: Mapping[str, str], authorization: str) -> str | None:
    """Name of the key in an `Authorization: Bearer ...` header, None when it is none of `keys`."""
    scheme, _, key = authorization.partition(" ")
    if scheme.lower() != "bearer":
        return None
    given = digest(key.strip())
    found = None
    for known, name in keys.items():  # all of them, so that time tells nothing
        if hmac.compare_digest(known, given):
            found = name
    return found


def main(arguments: list[str]) -> int:
    """Command line: `add FILE NAME`."""
    if len(arguments) != 3 or arguments[0] != "add":
        sys.stderr.write("usage: python -m modelyard.serving.keys add FILE NAME\n")
        return 2
    sys.stdout.write(add_key(Path(arguments[1]), arguments[2]) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
