"""Forms of keys and secrets: providers' prefixes, PEM blocks, and values assigned to telling names."""

from __future__ import annotations

from typing import Any

import numpy as np

from modelyard.corpus.kernels import kernel
from modelyard.corpus.kernels.forms import ALPHA, TOKEN, begins, ends_in_one, has

# Prefixes that providers put before their keys, and the fewest token bytes that follow.
_GIVEN: tuple[tuple[bytes, int], ...] = (
    (b"AKIA", 16), (b"ASIA", 16), (b"AIza", 35), (b"ghp_", 36), (b"gho_", 36), (b"ghu_", 36), (b"ghs_", 36),
    (b"ghr_", 36), (b"github_pat_", 40), (b"glpat-", 20), (b"sk-", 20), (b"sk_live_", 16), (b"sk_test_", 16),
    (b"rk_live_", 16), (b"xoxb-", 20), (b"xoxp-", 20), (b"xoxa-", 20), (b"xoxr-", 20), (b"xoxs-", 20),
    (b"xapp-", 30), (b"hooks.slack.com/services/", 30), (b"ya29.", 40), (b"GOCSPX-", 20), (b"whsec_", 24),
    (b"shpat_", 32), (b"sq0atp-", 22), (b"sq0csp-", 40), (b"dapi", 32), (b"AGE-SECRET-KEY-1", 50), (b"gsk_", 40),
    (b"eyJ", 30), (b"hf_", 30), (b"npm_", 36), (b"pypi-AgEI", 40), (b"SG.", 40), (b"dop_v1_", 60),
)  # fmt: skip
# Bytes from rare to frequent in text, as far as prefixes need it: a scan stops at a prefix's rarest byte, not at its
# first (an s begins every tenth word).
_RARE = b"JXZQKqxzVGIUP_-9/vkgwpb"


def _anchor(prefix: bytes) -> int:
    """Place of the prefix's rarest byte, the first one apart."""
    return min(range(1, len(prefix)), key=lambda k: _RARE.find(prefix[k]) % 256)


PREFIXES = tuple(sorted(_GIVEN, key=lambda p: p[0][_anchor(p[0])]))
ANCHORS = np.array([_anchor(p) for p, _ in PREFIXES], np.int64)
# Where the prefixes with a rarest byte begin; those of byte b are FIRST[b] to FIRST[b + 1].
FIRST = np.searchsorted([p[_anchor(p)] for p, _ in PREFIXES], np.arange(257)).astype(np.int64)
# Whether a byte, times 256, and the next one are a rarest byte of a prefix with the one before it.
PAIRS = np.zeros(65536, np.bool_)
PAIRS[[p[k - 1] << 8 | p[k] for (p, _), k in zip(PREFIXES, ANCHORS, strict=True)]] = True
PREFIX_BYTES = np.frombuffer(b"".join(p for p, _ in PREFIXES), np.uint8)
PREFIX_ENDS = np.cumsum([0] + [len(p) for p, _ in PREFIXES]).astype(np.int64)
PREFIX_LEAST = np.array([n for _, n in PREFIXES], np.int64)

KEYWORDS = (
    b"password", b"passwd", b"pwd", b"secret", b"api_key", b"apikey", b"api-key", b"token", b"access_key",
    b"secret_key", b"private_key", b"credential", b"accountkey", b"authorization",
)  # fmt: skip
KEYWORD_BYTES = np.frombuffer(b"".join(KEYWORDS), np.uint8)
KEYWORD_ENDS = np.cumsum([0] + [len(p) for p in KEYWORDS]).astype(np.int64)
_LAST = np.zeros(256, np.bool_)
_LAST[[word[-1] for word in KEYWORDS]] = True
_BEGIN = np.frombuffer(b"-----BEGIN ", np.uint8)
_PRIVATE = np.frombuffer(b"PRIVATE KEY", np.uint8)
_END = np.frombuffer(b"-----END ", np.uint8)


@kernel
def prefixed(data: Any, i: Any, start: Any, end: Any, forms: Any) -> Any:
    """Span of a key with a provider's prefix whose rarest byte is at i; (0, 0) = none."""
    if i == start or not PAIRS[np.int64(data[i - 1]) << 8 | data[i]]:
        return 0, 0
    for p in range(FIRST[data[i]], FIRST[data[i] + 1]):
        left = i - ANCHORS[p]
        if left < start or data[left] != PREFIX_BYTES[PREFIX_ENDS[p]]:
            continue
        phrase = PREFIX_BYTES[PREFIX_ENDS[p] : PREFIX_ENDS[p + 1]]
        if not begins(data, left, end, phrase) or has(data, left - 1, start, end, forms, TOKEN):
            continue
        k = left + len(phrase)
        dots = data[left] == 0x65 or data[left] == 0x53  # JWT and SendGrid keys have parts
        paths = data[k - 1] == 0x2F
        while k < end and (forms[data[k]] & TOKEN or (dots and data[k] == 0x2E) or (paths and data[k] == 0x2F)):
            k += 1
        if k - left - len(phrase) >= PREFIX_LEAST[p]:
            return left, k
    return 0, 0


@kernel
def private(data: Any, i: Any, end: Any) -> Any:
    """End of a PEM private key block at i; 0 = none. A block without its end runs to the text's end."""
    if i + 1 >= end or data[i + 1] != 0x2D or not begins(data, i, end, _BEGIN):
        return 0
    k = i + len(_BEGIN)
    while k < end and k - i < 60 and not begins(data, k, end, _PRIVATE):
        if data[k] == 0x0A or data[k] == 0x2D:
            return 0
        k += 1
    if not begins(data, k, end, _PRIVATE):
        return 0
    while k < end and not begins(data, k, end, _END):
        k += 1
    k = min(k + len(_END), end)
    while k < end and data[k] != 0x0A and data[k] != 0x2D:
        k += 1
    while k < end and data[k] == 0x2D:
        k += 1
    return k


@kernel
def assigned(data: Any, i: Any, start: Any, end: Any, forms: Any) -> Any:
    """Span of a value behind `password =`, `"api_key":` and the like, with = or : at i; (0, 0) = none.

    A value in quotes has at least 8 bytes, one without (`TOKEN=...`, `Authorization: Bearer ...`) 16.
    """
    k = i - 1
    while k > start and data[k] in (0x20, 0x22, 0x27, 0x5D):
        k -= 1
    named = k >= start and _LAST[data[k] | 0x20]
    if not named or not ends_in_one(data, k + 1, start, KEYWORD_BYTES, KEYWORD_ENDS, forms):
        return 0, 0
    k = i + 1
    while k < end and data[k] in (0x20, 0x3D, 0x3E):
        k += 1
    if k >= end or not (data[k] == 0x22 or data[k] == 0x27):
        return _bare(data, k, end, forms)
    quote, begin = data[k], k + 1
    k = begin
    while k < end and data[k] != quote and data[k] > 0x20:
        k += 1
    if k >= end or data[k] != quote or k - begin < 8:
        return 0, 0
    return begin, k


@kernel
def _bare(data: Any, k: Any, end: Any, forms: Any) -> Any:
    """Span of a value of at least 16 bytes without quotes at k, behind an authorization scheme; (0, 0) = none."""
    word = k
    while word < end and forms[data[word]] & ALPHA:
        word += 1
    scheme = word - k == 6 or word - k == 5  # Bearer, Basic, token
    if scheme and word < end and data[word] == 0x20:
        k = word + 1
    begin = k
    while k < end and (forms[data[k]] & TOKEN or data[k] in (0x2B, 0x2E, 0x2F, 0x3D, 0x7E)):
        k += 1
    return (begin, k) if k - begin >= 16 else (0, 0)
