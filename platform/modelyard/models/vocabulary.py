"""Whether one tokenizer's vocabulary extends another's. Light: `plan` asks without torch."""

from __future__ import annotations

import json

from modelyard.storage import exists, join, read_bytes


def extends_vocabulary(base: bytes, other: bytes) -> bool:
    """Whether the tokenizer `other` gives every token of `base` the same id; both are the text of a tokenizer.json."""
    ids = _vocabulary(other)
    return all(ids.get(token) == number for token, number in _vocabulary(base).items())


def folder_extends(tokenizer: str, model: str) -> bool:
    """Whether the tokenizer of one folder (a URI) extends that of a model folder; False where either is missing."""
    files = [join(folder, "tokenizer.json") for folder in (model, tokenizer)]
    return all(exists(file) for file in files) and extends_vocabulary(*(read_bytes(file) for file in files))


def _vocabulary(text: bytes) -> dict[str, int]:
    described = json.loads(text)
    words = described["model"].get("vocab", {})
    if isinstance(words, list):  # Unigram: tokens with their scores, in the order of ids.
        words = {entry[0]: number for number, entry in enumerate(words)}
    found: dict[str, int] = words | {token["content"]: token["id"] for token in described.get("added_tokens", [])}
    return found
