"""What the OpenAPI document says of answers: OpenAI's objects and errors, which clients and fuzzers can check."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

Schema = dict[str, Any]

_TEXT: Schema = {"type": "string"}
_COUNT: Schema = {"type": "integer", "minimum": 0}


def _object(required: Schema, **optional: Schema) -> Schema:
    return {"type": "object", "properties": required | optional, "required": list(required)}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _nullable(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


ERROR = _object({
    "error": _object({
        "message": {"type": "string", "minLength": 1}, "type": _TEXT, "param": _nullable(_TEXT),
        "code": _nullable(_TEXT),
    })
})  # fmt: skip
_USAGE = _object({"prompt_tokens": _COUNT, "total_tokens": _COUNT}, completion_tokens=_COUNT)
_FINISH = {"enum": ["stop", "length"]}
_HEAD = {"id": _TEXT, "created": _COUNT, "model": _TEXT, "usage": _USAGE}
_MESSAGE = _object({"role": {"const": "assistant"}, "content": _TEXT, "refusal": {"type": "null"}})
_CHOICE = {"index": _COUNT, "finish_reason": _FINISH, "logprobs": _nullable({"type": "object"})}
MODEL = _object({"id": _TEXT, "object": {"const": "model"}, "created": _COUNT, "owned_by": _TEXT})
_VECTOR = {"anyOf": [_list({"type": "number"}), {"type": "string", "contentEncoding": "base64"}]}

CHAT = _object(
    _HEAD | {"object": {"const": "chat.completion"}, "choices": _list(_object(_CHOICE | {"message": _MESSAGE}))}
)
COMPLETION = _object(
    _HEAD | {"object": {"const": "text_completion"}, "choices": _list(_object(_CHOICE | {"text": _TEXT}))}
)
EMBEDDINGS = _object({
    "object": {"const": "list"}, "model": _TEXT, "usage": _USAGE,
    "data": _list(_object({"object": {"const": "embedding"}, "index": _COUNT, "embedding": _VECTOR})),
})  # fmt: skip
MODELS = _object({"object": {"const": "list"}, "data": _list(MODEL)})
TASK = _object({
    "id": _TEXT, "object": {"const": "async.task"}, "endpoint": _TEXT, "created_at": _COUNT,
    "status": {"enum": ["queued", "in_progress", "completed", "failed", "cancelled"]},
    "finished_at": _nullable(_COUNT), "response": _nullable({"type": "object"}), "error": _nullable({"type": "object"}),
})  # fmt: skip
FEEDBACK = _object({"id": _TEXT, "object": {"const": "feedback"}})


def answers(schema: Schema, *, stream: bool = False, status: int = 200) -> dict[int | str, dict[str, Any]]:
    """FastAPI's `responses` of a route: its answer, as server-sent events too, and errors of every kind."""
    content: Schema = {"application/json": {"schema": schema}}
    if stream:
        content["text/event-stream"] = {}
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {
        status: {"description": "the answer", "content": content},
        "4XX": {"description": "the request is at fault, or has to wait", "content": error},
        "5XX": {"description": "the server is at fault", "content": error},
    }


def complete(app: FastAPI, *, keys: bool) -> None:
    """Adds what routes share to the application's OpenAPI document: the error object, and the key if one is asked."""
    plain = app.openapi

    def document() -> dict[str, Any]:
        made = plain()
        parts = made.setdefault("components", {})
        parts.setdefault("schemas", {})["Error"] = ERROR
        if keys:
            parts["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            made["security"] = [{"key": []}]
        return made

    app.openapi = document  # type: ignore[method-assign]
