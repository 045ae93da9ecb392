"""Keeps secrets out of everything that is logged, and flattens nested options into MLflow parameters."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "[redacted]"
PARAM_LIMIT = 6000
"""Longest parameter value, in characters, that MLflow's SQL store accepts."""
KEY_LIMIT = 250

_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
_SECRET_WORDS = frozenset(
    ("key", "apikey", "token", "secret", "secrets", "password", "passwd", "passphrase", "credential", "credentials")
)
_BAD_KEY = re.compile(r"[^\w\-. :/]")
_URL_PASSWORD = re.compile(r"(?<=://)([^\s/@:]*:)[^\s/@]+(?=@)")
_SHORTEST_SECRET = 8  # an environment value shorter than this ("1", "yes") would blank ordinary text


def is_secret(name: str) -> bool:
    """Whether a name sounds like a secret: `api_key`, `hfToken`; but not `tokenizer` or `max_tokens`."""
    return any(word.lower() in _SECRET_WORDS for word in _WORD.findall(name))


def _environment_secrets() -> list[str]:
    values = {v for k, v in os.environ.items() if is_secret(k) and len(v) >= _SHORTEST_SECRET}
    return sorted(values, key=len, reverse=True)


def redact_text(text: str) -> str:
    """`text` with every value of a secret-sounding environment variable blanked, and every password of a URL."""
    for secret in _environment_secrets():
        text = text.replace(secret, HIDDEN)
    return _URL_PASSWORD.sub(rf"\1{HIDDEN}", text)


def redact(value: Any, name: str = "") -> Any:
    """A copy of nested options in which no secret is left.

    A string under a secret-sounding name is blanked, and so is any part of a string that equals the
    value of a secret-sounding environment variable or is a URL's password. Numbers stay: `tokens: 256` is no secret.
    """
    if isinstance(value, Mapping):
        return {key: redact(item, str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(item, name) for item in value]
    if isinstance(value, str):
        return HIDDEN if value and is_secret(name) else redact_text(value)
    return value


def flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested options as MLflow parameters: dotted names, secrets blanked, long values cut.

    Lists of plain values stay one parameter (JSON); lists that hold mappings are numbered.
    """
    flat: dict[str, str] = {}
    for key, value in redact(params).items():
        name = f"{prefix}{key}"
        if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            value = {str(i): item for i, item in enumerate(value)}
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{name}.")
        else:
            flat[safe_key(name)] = _cut(_text(value))
    return flat


def safe_key(name: str) -> str:
    """`name` with the characters MLflow refuses replaced by `_`, at most 250 of them."""
    return _BAD_KEY.sub("_", name)[:KEY_LIMIT]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def _cut(text: str) -> str:
    return text if len(text) <= PARAM_LIMIT else text[: PARAM_LIMIT - 3] + "..."
