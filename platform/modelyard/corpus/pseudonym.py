"""Substitutes for personal data: the same value gets the same substitute in every shard and every run.

The substitute is derived from HMAC-SHA256 (RFC 2104) of the canonical value under a key that only its
owner has, and drawn from ranges that belong to nobody: example.org, 198.18.0.0/15 (RFC 2544),
2001:db8::/32 (RFC 3849), 555-01xx numbers, locally administered MAC addresses, SSN areas never issued,
dates of 1900, the sea around Point Nemo, Example Street; names are combined from short lists.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from pathlib import Path

from modelyard.errors import RecipeError

VARIABLE = "MODELYARD_PSEUDONYM_KEY"
_LEAST = 16


def load_key(file: str | None) -> bytes:
    """The pseudonym key, from a file or the environment.

    Raises:
        RecipeError: it is missing, unreadable or shorter than 16 bytes. The key itself is never shown.
    """
    if file is None:
        key, place = os.environ.get(VARIABLE, "").encode(), f"environment variable {VARIABLE}"
    else:
        place = file
        try:
            key = Path(file).expanduser().read_bytes().strip()
        except OSError as error:
            raise RecipeError(
                f"the pseudonym key cannot be read: {error.strerror}", place=file, mend="give a readable key_file"
            ) from error
    if len(key) < _LEAST:
        problem = "is missing" if not key else f"has only {len(key)} bytes"
        raise RecipeError(
            f"pseudonymize needs a secret key, and it {problem}",
            place=place,
            mend=f'export {VARIABLE}="$(openssl rand -hex 32)" and keep it, or use redact instead',
        )
    return key


class Pseudonyms:
    """Makes substitutes under one key."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def __call__(self, kind: str, value: str) -> str:
        """The substitute of a value of entity type `kind`."""
        canonical = _canonical(kind, value)
        digest = hmac.new(self._key, f"{kind}\0{canonical}".encode(), hashlib.sha256).hexdigest()
        return _substitute(kind, value, digest)


def _canonical(kind: str, value: str) -> str:
    if kind in ("phone", "card", "ssn"):
        return "".join(c for c in value if c.isdigit())
    if kind in ("iban", "national_id"):
        return "".join(c for c in value if c.isalnum()).upper()
    if kind in ("address", "person", "organisation", "location"):
        return " ".join(value.lower().split())
    return value.lower() if kind in ("email", "ip") else value.lower().replace("-", ":") if kind == "mac" else value


def _substitute(kind: str, value: str, digest: str) -> str:
    number = int(digest, 16)
    if kind == "email":
        return f"user-{digest[:12]}@example.org"
    if kind == "ip":
        if ":" in value:
            return f"2001:db8::{digest[:4]}:{digest[4:8]}:{digest[8:12]}"
        return f"198.{18 + number % 2}.{number // 2 % 256}.{number // 512 % 256}"
    if kind == "phone":
        return f"({200 + number % 800}) 555-01{number // 800 % 100:02d}"
    if kind == "mac":
        return ":".join(["02", *(digest[i : i + 2] for i in range(0, 10, 2))])
    if kind == "ssn":
        # Groups below 50: those above are issued as taxpayer numbers.
        return f"9{number % 100:02d}-{number // 100 % 49 + 1:02d}-{number // 10_000 % 10_000:04d}"
    if kind == "card":
        return f"0000 {number % 10**4:04d} {number // 10**4 % 10**4:04d} {number // 10**8 % 10**4:04d}"
    if kind == "iban":
        return f"XX00 {number % 10**4:04d} {number // 10**4 % 10**4:04d} {number // 10**8 % 10**4:04d}"
    if kind in ("national_id", "birth_date", "coordinates", "address", "person", "organisation", "location"):
        return _of_person(kind, value, number)
    return f"user-{digest[:8]}:{digest[8:16]}" if kind == "url_credentials" else f"key-{digest[:32]}"


# fmt: off
_FIRST = (
    "Alex", "Bo", "Cai", "Dana", "Eli", "Finn", "Gale", "Hari", "Indra", "Jo", "Kai", "Lee", "Mika", "Noa", "Oli",
    "Pat", "Quinn", "Rae", "Sam", "Toni", "Uma", "Val", "Wren", "Yuri",
)
_LAST = (
    "Ash", "Birch", "Clay", "Dale", "Elm", "Fern", "Glen", "Heath", "Ivy", "Juniper", "Kestrel", "Linden", "Moss",
    "Nettle", "Oak", "Pine", "Quill", "Reed", "Stone", "Thorn", "Upland", "Vale", "Willow", "Yarrow",
)
# fmt: on


def _of_person(kind: str, value: str, number: int) -> str:
    if kind == "national_id":
        return f"0000-{number % 10_000:04d}-{number // 10_000 % 10_000:04d}"
    if kind == "birth_date":
        return f"1900-{number % 12 + 1:02d}-{number // 12 % 28 + 1:02d}"
    if kind == "coordinates":
        latitude, longitude = f"-48.876{number % 1000:03d}", f"-123.393{number // 1000 % 1000:03d}"
        return f"{latitude}, {longitude}" if len(value) > 16 else latitude
    first, last = _FIRST[number % len(_FIRST)], _LAST[number // 64 % len(_LAST)]
    tail = number // 4096 % 1000
    return {
        "address": f"{tail + 1} Example Street",
        "person": f"{first} {last}",
        "organisation": f"{last} {first} {tail} Ltd",
        "location": f"{last}{_TOWN[number // 5 % len(_TOWN)]}",
    }[kind]


_TOWN = ("ford", "ham", "bury", "ton", "field", "mouth")
