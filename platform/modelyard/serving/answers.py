"""Step outputs as OpenAI objects: whole answers and streamed chunks, for text and chat completions."""

from __future__ import annotations

import base64
import json
import struct
import time
import uuid
from collections.abc import Mapping
from json.encoder import encode_basestring
from typing import Any, Protocol

from modelyard.engine.request import StepOutput, TokenLogprob
from modelyard.engine.tokenizer import Tokenizer


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """OpenAI's usage object."""
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


def embeddings_object(model: str, answers: list[StepOutput], tokens: int, form: str) -> dict[str, Any]:
    """OpenAI's list of vectors, one an answer. tokens: of all inputs together. form: `float` or `base64`."""
    data = [
        {"object": "embedding", "index": i, "embedding": _vector(answer.embedding, form)}
        for i, answer in enumerate(answers)
    ]
    return {"object": "list", "model": model, "data": data, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}


def _vector(values: tuple[float, ...], form: str) -> list[float] | str:
    """As numbers, or as base64 of little-endian float32, which the official client asks for."""
    if form == "float":
        return list(values)
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode("ascii")


# Made once: json.dumps with options makes an encoder a call, which costs as much as a chunk.
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def event(value: Mapping[str, Any]) -> bytes:
    """An object as a server-sent event."""
    return b"data: " + _encode(value).encode() + b"\n\n"


class Form(Protocol):
    """How one endpoint writes answers. `id` names the whole response."""

    id: str

    def whole(self, answers: list[StepOutput], prompt_tokens: int) -> dict[str, Any]:
        """The object of a response that is not streamed, one choice an answer."""
        ...

    def opening(self, index: int) -> dict[str, Any] | None:
        """The chunk before a choice's first text, None when there is none."""
        ...

    def chunk(self, index: int, output: StepOutput) -> bytes | None:
        """The event for a message from the engine, None when it holds nothing to send."""
        ...

    def closing(self, prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
        """The last chunk, with the usage."""
        ...


class _Base:
    prefix = ""
    kind = ""
    chunk_kind = ""

    def __init__(self, model: str, tokenizer: Tokenizer, *, include_usage: bool = False) -> None:
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self._tokenizer = tokenizer
        self._head = {"id": self.id, "object": self.chunk_kind, "created": int(time.time()), "model": model}
        # With include_usage every chunk carries the field, null until the last.
        self._usage: dict[str, Any] = {"usage": None} if include_usage else {}
        self._around: dict[int, tuple[bytes, bytes]] = {}

    def chunk(self, index: int, output: StepOutput) -> bytes | None:
        if output.finish is not None or output.logprobs:
            return event(self._chunk(self._choice(index, output)))
        if not output.text:
            return None
        # Most chunks of a choice differ in their text alone: the rest is encoded once (1.3 us a chunk, not 5).
        before, after = self._around.get(index) or self._surround(index)
        return before + encode_basestring(output.text).encode() + after

    def _surround(self, index: int) -> tuple[bytes, bytes]:
        """What stands before and after the text in events that bring nothing else."""
        before, _, after = event(self._chunk(self._choice(index, StepOutput((), "\0")))).rpartition(b'"\\u0000"')
        self._around[index] = before, after
        return before, after

    def _choice(self, index: int, output: StepOutput) -> dict[str, Any]:
        """A choice of a streamed chunk."""
        raise NotImplementedError

    def closing(self, prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
        return self._head | {"choices": [], "usage": usage(prompt_tokens, completion_tokens)}

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        return self._head | {"choices": [choice]} | self._usage

    def _whole(self, choices: list[dict[str, Any]], prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
        return self._head | {
            "object": self.kind,
            "choices": choices,
            "usage": usage(prompt_tokens, completion_tokens),
        }


class TextForm(_Base):
    """Text completions."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, tokenizer: Tokenizer, *, include_usage: bool = False) -> None:
        super().__init__(model, tokenizer, include_usage=include_usage)
        self._offsets: dict[int, int] = {}

    def whole(self, answers: list[StepOutput], prompt_tokens: int) -> dict[str, Any]:
        choices = [self._choice(i, a) for i, a in enumerate(answers)]
        return self._whole(choices, prompt_tokens, sum(len(a.tokens) for a in answers))

    def opening(self, index: int) -> dict[str, Any] | None:
        return None

    def _choice(self, index: int, output: StepOutput) -> dict[str, Any]:
        logprobs = self._logprobs(index, output.logprobs) if output.logprobs else None
        return {"index": index, "text": output.text, "logprobs": logprobs, "finish_reason": output.finish}

    def _logprobs(self, index: int, entries: tuple[TokenLogprob, ...]) -> dict[str, Any]:
        texts = [self._tokenizer.token_text(e.token) for e in entries]
        offsets, at = [], self._offsets.get(index, 0)
        for text in texts:
            offsets.append(at)
            at += len(text)
        self._offsets[index] = at
        top = [{self._tokenizer.token_text(t): p for t, p in e.top} for e in entries]
        return {
            "tokens": texts,
            "token_logprobs": [e.logprob for e in entries],
            "top_logprobs": top if any(top) else None,
            "text_offset": offsets,
        }


class ChatForm(_Base):
    """Chat completions."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def whole(self, answers: list[StepOutput], prompt_tokens: int) -> dict[str, Any]:
        choices = [
            {
                "index": i,
                "message": {"role": "assistant", "content": a.text, "refusal": None},
                "logprobs": self._logprobs(a.logprobs) if a.logprobs else None,
                "finish_reason": a.finish,
            }
            for i, a in enumerate(answers)
        ]
        return self._whole(choices, prompt_tokens, sum(len(a.tokens) for a in answers))

    def opening(self, index: int) -> dict[str, Any] | None:
        delta = {"role": "assistant", "content": ""}
        return self._chunk({"index": index, "delta": delta, "logprobs": None, "finish_reason": None})

    def _choice(self, index: int, output: StepOutput) -> dict[str, Any]:
        delta = {"content": output.text} if output.text else {}
        logprobs = self._logprobs(output.logprobs) if output.logprobs else None
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": output.finish}

    def _logprobs(self, entries: tuple[TokenLogprob, ...]) -> dict[str, Any]:
        def entry(token: int, logprob: float) -> dict[str, Any]:
            text = self._tokenizer.token_text(token)
            return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

        content = [entry(e.token, e.logprob) | {"top_logprobs": [entry(t, p) for t, p in e.top]} for e in entries]
        return {"content": content, "refusal": None}
