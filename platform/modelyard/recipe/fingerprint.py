"""What decides a stage's result, as one hash; and in words, what differs between two of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel


def decisive(options: BaseModel) -> dict[str, Any]:
    """The fields of an option model that decide the result, as plain JSON values.

    Left out: fields made with `runtime(...)`, at any depth, and `inputs`, which enter by content.
    """
    fields = type(options).model_fields
    return {
        name: _plain(getattr(options, name))
        for name in fields
        if name != "inputs" and not _is_runtime(fields[name].json_schema_extra)
    }


def _is_runtime(extra: object) -> bool:
    return isinstance(extra, Mapping) and extra.get("fingerprint") is False


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return decisive(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, (set, frozenset)):
        return sorted(_plain(v) for v in value)
    return value if isinstance(value, (str, int, float, bool)) or value is None else str(value)


def fingerprint(kind: str, version: int, options: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """SHA-256 over the canonical JSON of kind, kind version, decisive options and input fingerprints."""
    content = {"kind": kind, "version": version, "options": options, "inputs": dict(inputs)}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Human-readable differences of two plain values: `learning_rate 0.0003 -> 0.0001`."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = list(dict.fromkeys([*old, *new]))
        return [line for key in keys for line in _difference_at(old, new, key, f"{path}.{key}" if path else str(key))]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [
            line for i, (a, b) in enumerate(zip(old, new, strict=True)) for line in differences(a, b, f"{path}.{i}")
        ]
    return [] if old == new else [f"{path} {_short(old)} -> {_short(new)}"]


def _difference_at(old: Mapping[str, Any], new: Mapping[str, Any], key: str, path: str) -> list[str]:
    if key not in old:
        return [f"{path} added: {_short(new[key])}"]
    if key not in new:
        return [f"{path} removed"]
    return differences(old[key], new[key], path)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
