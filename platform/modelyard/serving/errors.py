"""Errors in the shape OpenAI clients read: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

from typing import Any


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


def overloaded() -> ApiError:
    """429: too many requests wait."""
    return ApiError(
        429, "too many requests are waiting; try again", kind="rate_limit_error", code="overloaded", retry_after=1
    )


def unavailable(message: str) -> ApiError:
    """503: no replica can answer now."""
    return ApiError(503, message, kind="server_error", code="unavailable", retry_after=2)
