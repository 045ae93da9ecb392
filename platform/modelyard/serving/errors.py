"""Errors in the shape OpenAI clients read: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.types import Send


class ApiError(Exception):
    """An error with an HTTP status.

    Args:
        status: HTTP status code.
        message: for the person who sent the request.
        kind: OpenAI's error type; also the label of the error metric.
        param: the field at fault.
        code: a short machine-readable word.
        retry_after: seconds for the Retry-After header.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind = status, message, kind
        self.param, self.code, self.retry_after = param, code, retry_after

    def body(self) -> dict[str, Any]:
        """The JSON object to send."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Headers to send with it."""
        return {} if self.retry_after is None else {"retry-after": str(self.retry_after)}


async def refuse(error: ApiError, send: Send) -> None:
    """Answers an ASGI request with an error."""
    headers = {"content-type": "application/json"} | error.headers()
    pairs = [(k.encode(), v.encode()) for k, v in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": pairs})
    await send({"type": "http.response.body", "body": json.dumps(error.body()).encode()})


def overloaded() -> ApiError:
    """429: too many requests wait."""
    return ApiError(
        429, "too many requests are waiting; try again", kind="rate_limit_error", code="overloaded", retry_after=1
    )


def unavailable(message: str) -> ApiError:
    """503: no replica can answer now."""
    return ApiError(503, message, kind="server_error", code="unavailable", retry_after=2)


_ALTERNATIVES = frozenset({"str", "int", "float", "bool", "Literal"})


def invalid_field(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """400: what pydantic found wrong with a body, as one sentence about one field.

    Where a field may be of several types, each alternative has its own complaint: the one that got furthest into the
    value is the one the sender meant, and of two that got as far the one whose type fits. errors: pydantic's, at least
    one, with `loc`, `msg` and `type`.
    """
    first = errors[0]
    if first["type"] == "json_invalid":
        reason = str(first.get("ctx", {}).get("error", "")).rstrip(".")
        return ApiError(400, f"the body is not JSON: {reason} (at character {first['loc'][-1]})")
    if first["loc"] == ("body",):
        return ApiError(400, f"the body: {_sentence(first)}")
    mine = [e for e in errors if e["loc"][:2] == first["loc"][:2]]
    best = max(mine, key=lambda e: (len(_path(e["loc"])), not str(e["type"]).endswith("_type")))
    field = ".".join(_path(best["loc"]))
    return ApiError(400, f"{field}: {_sentence(best)}", param=field)


def _path(loc: Sequence[str | int]) -> list[str]:
    """Field names and positions, without the names of a union's alternatives."""
    inner = [str(p) for p in loc[1:2]]
    return inner + [str(p) for p in loc[2:] if isinstance(p, int) or (p.isidentifier() and p not in _ALTERNATIVES)]


def _sentence(error: Mapping[str, Any]) -> str:
    return str(error["msg"]).removeprefix("Value error, ")
