"""Telling an address that a task has ended: only addresses the operator allows, signed as OpenAI's webhooks are.

The signature is that of standardwebhooks.com: `openai.webhooks.unwrap(payload, headers)` checks it.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from modelyard.errors import DataError
from modelyard.serving.tasks import Task

log = logging.getLogger(__name__)

DELAYS = (0.0, 1.0, 5.0, 25.0)
"""Seconds before each attempt to deliver."""


def allowed(url: str, prefixes: Sequence[str]) -> bool:
    """Whether a webhook may go to `url`: scheme, host and port of a prefix, and a path below its own.

    Without such a list a caller could make the server send requests into the network behind it.
    """
    try:
        given = urlsplit(url)
        if given.username is not None or ".." in given.path or given.port == 0:
            return False
    except ValueError:
        return False
    for prefix in map(urlsplit, prefixes):
        below = given.path == prefix.path or given.path.startswith(prefix.path.rstrip("/") + "/")
        if (given.scheme, given.netloc) == (prefix.scheme, prefix.netloc) and below:
            return True
    return False


def read_secret(file: Path) -> bytes:
    """The key of the signatures: base64 after `whsec_`. Raises DataError when the file holds none."""
    try:
        text = file.read_text(encoding="utf-8").strip()
        return base64.b64decode(text.removeprefix("whsec_"), validate=True)
    except (OSError, ValueError) as error:
        raise DataError(
            f"cannot read the webhook secret: {type(error).__name__}", place=str(file),
            mend="write whsec_ and 32 random bytes in base64 into it",
        ) from error  # fmt: skip


def sign(secret: bytes, name: str, timestamp: int, payload: bytes) -> str:
    """Value of the `webhook-signature` header."""
    content = f"{name}.{timestamp}.".encode() + payload
    return "v1," + base64.b64encode(hmac.new(secret, content, hashlib.sha256).digest()).decode()


class Messenger:
    """Delivers. Redirects are not followed; an address that does not answer with 2xx is asked again a few times."""

    def __init__(self, secret: bytes | None) -> None:
        self._secret = secret
        self._http = httpx.AsyncClient(timeout=10, follow_redirects=False)

    async def tell(self, task: Task) -> None:
        """Posts an ended task to its webhook; a failure is logged without the address's path."""
        event = {"type": f"async.{task.status}", "created_at": task.finished, "data": task.public()}
        payload, status = json.dumps(event).encode(), "no answer"
        for delay in DELAYS:
            await asyncio.sleep(delay)
            now = int(time.time())
            headers = {"content-type": "application/json", "webhook-id": task.id, "webhook-timestamp": str(now)}
            if self._secret is not None:
                headers["webhook-signature"] = sign(self._secret, task.id, now, payload)
            try:
                response = await self._http.post(task.webhook, content=payload, headers=headers)
            except httpx.HTTPError as error:
                status = type(error).__name__
                continue
            if response.is_success:
                return
            status = str(response.status_code)
        log.warning("a webhook to %s was given up: %s", urlsplit(task.webhook).hostname, status)
