"""A small client of an OpenAI-compatible server: who it is, and one streamed answer with the time of every piece."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from modelyard.errors import DataError, ResourceError, StageError
from modelyard.serving.tls import client_context


@dataclass(frozen=True)
class Piece:
    """One message of a streamed answer: seconds since it was asked for, text, and the token counts of the last one."""

    seconds: float
    text: str
    prompt_tokens: int = 0
    tokens: int = 0


class Refused(StageError):
    """The server answered with an error. `status` is the HTTP status, 200 when it came in the midst of a stream."""

    def __init__(self, status: int, message: str, place: str, mend: str = "") -> None:
        super().__init__(message, place=place, mend=mend or _MENDS.get(status, ""))
        self.status = status


_MENDS = {401: "give a key with --key, or in MODELYARD_API_KEY", 429: "wait, or lower the rate"}
_STRANGE = "is this the address of an OpenAI-compatible server?"


def base(url: str) -> str:
    """The address without a trailing slash or `/v1`. Raises DataError when it is no http address."""
    found = (url if "://" in url else f"http://{url}").rstrip("/").removesuffix("/v1")
    if not found.startswith(("http://", "https://")):
        raise DataError(f"{url!r} is not an HTTP address", place="URL", mend="write http://127.0.0.1:8000")
    return found


class Client:
    """Asks one server.

    Args:
        url: its address, with or without `/v1`.
        key: API key, if it asks for one.
        connections: requests in flight at most.
        ca: PEM file of the certificates to trust over HTTPS; None = the well-known authorities.

    Raises DataError for an address or a file that cannot be.
    """

    def __init__(self, url: str, key: str | None = None, connections: int = 1000, ca: str | None = None) -> None:
        self.url = base(url)
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.AsyncClient(
            base_url=self.url,
            headers=headers,
            timeout=httpx.Timeout(600, connect=10),
            limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
            verify=client_context(ca, hostname=True) if ca else True,
        )

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def model(self) -> str:
        """The first model's name. Raises ResourceError when nothing answers, Refused when it does not want to."""
        try:
            answer = await self._http.get("/v1/models")
        except httpx.TransportError as error:
            raise ResourceError(
                f"no server answers: {error or type(error).__name__}",
                place=self.url,
                mend=_mend(error),
            ) from error
        if answer.status_code != 200:
            raise _refused(answer.status_code, answer.content, self.url)
        try:
            return str(answer.json()["data"][0]["id"])
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise Refused(404, "the answer of /v1/models is not OpenAI's", self.url, _STRANGE) from error

    async def chat(self, model: str, messages: Sequence[Mapping[str, Any]], **options: Any) -> AsyncIterator[Piece]:
        """Pieces of an answer as they come, the last with token counts. Raises Refused or ResourceError."""
        body = {"model": model, "messages": list(messages), **options}
        async for piece in self._stream("/v1/chat/completions", body):
            yield piece

    async def complete(self, model: str, prompt: str | list[int], **options: Any) -> AsyncIterator[Piece]:
        """The same for a text completion."""
        async for piece in self._stream("/v1/completions", {"model": model, "prompt": prompt, **options}):
            yield piece

    async def _stream(self, path: str, body: dict[str, Any]) -> AsyncIterator[Piece]:
        began = time.perf_counter()
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        try:
            async with self._http.stream("POST", path, json=body) as answer:
                if answer.status_code != 200:
                    raise _refused(answer.status_code, await answer.aread(), self.url)
                async for line in answer.aiter_lines():
                    if line.startswith("data: {"):
                        yield self._piece(json.loads(line[6:]), time.perf_counter() - began)
        except httpx.TransportError as error:
            raise ResourceError(
                f"the connection broke: {error or type(error).__name__}", place=self.url, mend="ask again"
            ) from error

    def _piece(self, event: Mapping[str, Any], seconds: float) -> Piece:
        if "error" in event:
            raise Refused(200, str(event["error"].get("message", "error")), self.url)
        usage = event.get("usage") or {}
        text = ""
        for choice in event.get("choices", ()):
            text += (choice.get("delta") or {}).get("content") or choice.get("text") or ""
        return Piece(seconds, text, int(usage.get("prompt_tokens", 0)), int(usage.get("completion_tokens", 0)))


def _mend(error: httpx.TransportError) -> str:
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return "give the certificate of who issued the server's with --ca, and the host name that it was issued for"
    return "start one with `modelyard serve`, or check the address"


def _refused(status: int, content: bytes, place: str) -> Refused:
    try:
        return Refused(status, str(json.loads(content)["error"]["message"]), place)
    except (ValueError, KeyError, TypeError):
        told = content[:200].decode("utf-8", "replace") or "no reason given"
        return Refused(status, f"HTTP {status}: {told}", place, _STRANGE)
