"""Tokens to text as they come, and stop strings that may begin in one token and end in another."""

from __future__ import annotations

from tokenizers.decoders import DecodeStream

from modelyard.engine.tokenizer import Tokenizer


class Detokenizer:
    """Text of one answer. What could still become a stop string or is half a character is held back."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...]) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._stream = DecodeStream(skip_special_tokens=True)
        self._tokens: list[int] = []
        self._decoded = 0
        self._held = ""

    def push(self, token: int) -> tuple[str, bool]:
        """Adds a token; returns text that is now certain and whether a stop string was completed."""
        self._tokens.append(token)
        piece = self._stream.step(self._tokenizer.backend, token) or ""
        self._decoded += len(piece)
        return self._scan(piece)

    def flush(self) -> str:
        """The rest at the end of an answer that no stop string ended, half characters as U+FFFD."""
        tail = self._tokenizer.decode(self._tokens)[self._decoded :]
        text, stopped = self._scan(tail)
        return text if stopped else text + self._held

    def _scan(self, piece: str) -> tuple[str, bool]:
        text = self._held + piece
        self._held = ""
        found = [at for at in (text.find(s) for s in self._stop) if at >= 0]
        if found:
            return text[: min(found)], True
        keep = max((_overlap(text, s) for s in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
