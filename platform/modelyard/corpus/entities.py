"""Which candidates are personal data: checksums, registries and context, on the few spans a kernel proposes."""

from __future__ import annotations

import bisect
import functools
import ipaddress
import math
import re
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import phonenumbers

from modelyard.corpus import identities, places
from modelyard.corpus.arrow import buffers
from modelyard.corpus.kernels import entities as kernels
from modelyard.corpus.kernels.context import REACH
from modelyard.corpus.kernels.keys import PREFIXES

# Reserved for documentation (RFC 2606, RFC 6761) and for our substitutes: nobody's address.
_RESERVED_DOMAINS = (".example.com", ".example.org", ".example.net", ".example", ".test", ".invalid", ".localhost")
_FILE_SUFFIXES = {"png", "jpg", "jpeg", "gif", "svg", "webp", "js", "css", "py", "html", "json", "service"}
_IBAN_LENGTHS = {
    "AD": 24, "AE": 23, "AL": 28, "AT": 20, "AZ": 28, "BA": 20, "BE": 16, "BG": 22, "BH": 22, "BR": 29, "BY": 28,
    "CH": 21, "CR": 22, "CY": 28, "CZ": 24, "DE": 22, "DK": 18, "DO": 28, "EE": 20, "EG": 29, "ES": 24, "FI": 18,
    "FO": 18, "FR": 27, "GB": 22, "GE": 22, "GI": 23, "GL": 18, "GR": 27, "GT": 28, "HR": 21, "HU": 28, "IE": 22,
    "IL": 23, "IQ": 23, "IS": 26, "IT": 27, "JO": 30, "KW": 30, "KZ": 20, "LB": 28, "LC": 32, "LI": 21, "LT": 20,
    "LU": 20, "LV": 21, "LY": 25, "MC": 27, "MD": 24, "ME": 22, "MK": 19, "MR": 27, "MT": 31, "MU": 30, "NL": 18,
    "NO": 15, "PK": 24, "PL": 28, "PS": 29, "PT": 25, "QA": 29, "RO": 24, "RS": 22, "SA": 24, "SC": 31, "SE": 24,
    "SI": 19, "SK": 24, "SM": 27, "ST": 25, "SV": 28, "TL": 23, "TN": 24, "TR": 26, "UA": 29, "VA": 22, "VG": 24,
    "XK": 20,
}  # fmt: skip
_VERSION = re.compile(r"(?:\bv|version|release|ver\.?|rev\.?|[=<>~^]=?)\s*$", re.IGNORECASE)
_BEFORE = REACH  # bytes before a candidate that its check may look at
_AFTER = 64
_PLACEHOLDER = re.compile(
    r"your|example|placeholder|change_?me|xxx|\*\*\*|<|>|\$\{|\{\{|%\(|dummy|redacted|password|secret|\btest|foo|bar",
    re.IGNORECASE,
)


class Span(NamedTuple):
    """One entity: document, place in its UTF-8 bytes, type and text."""

    document: int
    start: int
    end: int
    type: str
    text: str


def _email(text: str, _before: str, _after: str, _region: str | None) -> int:
    domain = "." + text.rpartition("@")[2].lower()
    nobody = domain.endswith(_RESERVED_DOMAINS) or domain.rpartition(".")[2] in _FILE_SUFFIXES
    return 0 if nobody or text.startswith("git@") else len(text)


def _ip(text: str, before: str, _after: str, _region: str | None) -> int:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return 0
    if isinstance(address, ipaddress.IPv4Address):
        if text.split(".")[1:] == ["0", "0", "0"] or text.startswith("0.") or _VERSION.search(before):
            return 0
        if address in _BENCHMARK_NET or address in _V4_NOBODY:
            return 0
    private = address.is_loopback or address.is_link_local or address.is_unspecified
    private = private or (address.is_private and not address.is_reserved)
    return 0 if private or (address.version == 6 and address.is_reserved) else len(text)


_BENCHMARK_NET = ipaddress.IPv4Network("198.18.0.0/15")
_V4_NOBODY = ipaddress.IPv4Network("255.0.0.0/8")


def _card(text: str, _before: str, _after: str, _region: str | None) -> int:
    digits = re.sub(r"[ -]", "", text)
    groups = [len(g) for g in re.split(r"[ -]", text)]
    if len(set(digits)) < 2 or not (len(groups) == 1 or groups in _CARD_GROUPS):
        return 0
    two, four, n = int(digits[:2]), int(digits[:4]), len(digits)
    known = (
        (digits[0] == "4" and n in (13, 16, 19))
        or ((51 <= two <= 55 or 2221 <= four <= 2720) and n == 16)
        or (two in (34, 37) and n == 15)
        or ((four == 6011 or two in (64, 65)) and 16 <= n <= 19)
        or (two == 35 and 16 <= n <= 19)
        or (two in (30, 36, 38, 39) and 14 <= n <= 19)
        or (two == 62 and 16 <= n <= 19)
        or (four in (1800, 2131) and n == 15)
        or ((two in (56, 57, 58, 67) or four in _MAESTRO) and 12 <= n <= 19)
    )
    return len(text) if known else 0


_CARD_GROUPS = ([4, 4, 4, 4], [4, 6, 5], [4, 6, 4], [4, 4, 4, 4, 3], [4, 4, 4, 1])
_MAESTRO = {5018, 5020, 5038, 6304, 6390}


def _iban(text: str, _before: str, _after: str, _region: str | None) -> int:
    wanted = _IBAN_LENGTHS.get(text[:2].upper())
    if wanted is None:
        return 0
    plain, end = "", 0
    while end < len(text) and len(plain) < wanted:
        plain += text[end] if text[end].isalnum() else ""
        end += 1
    if len(plain) != wanted or text[end : end + 1].isalnum():
        return 0
    number = "".join(str(int(c, 36)) for c in (plain[4:] + plain[:4]).upper())
    return end if int(number) % 97 == 1 else 0


def _ssn(text: str, _before: str, _after: str, _region: str | None) -> int:
    area, group, serial = int(text[:3]), int(text[4:6]), int(text[7:])
    return 0 if area in (0, 666) or area >= 900 or group == 0 or serial == 0 else len(text)


def _mac(text: str, _before: str, _after: str, _region: str | None) -> int:
    value = text.replace("-", ":").lower()
    # Locally administered 02:... is where our substitutes lie; all zeros or ones are no device.
    return 0 if value.startswith("02:") or len(set(value.split(":"))) == 1 else len(text)


def _entropy(text: str) -> float:
    """Bits a character of the text's own character distribution (Shannon)."""
    counts = Counter(text)
    return -sum(n / len(text) * math.log2(n / len(text)) for n in counts.values())


def _key(text: str, before: str, _after: str, _region: str | None) -> int:
    if text.startswith("-----BEGIN"):
        return len(text) if text.count("\n") > 0 and len(text) > 120 else 0
    if _PLACEHOLDER.search(text) or _SUBSTITUTE.fullmatch(text) or _entropy(text) < 2.8:
        return 0
    if any(text.startswith(prefix.decode()) for prefix, _ in PREFIXES):
        return len(text) if any(c.isdigit() for c in text) else 0
    if before[-1:] not in ("'", '"'):
        return len(text) if _BARE.fullmatch(text) and _entropy(text) >= 3.5 else 0
    mixed = any(c.isdigit() for c in text) and any(c.isalpha() for c in text)
    return len(text) if mixed and not re.search(r"[(){}\[\]\s/\\]", text) and _entropy(text) >= 3.0 else 0


# Without quotes only what looks random: all of upper case, lower case and digits, or long hexadecimal.
_BARE = re.compile(r"(?=.*[A-Z])(?=.*[a-z])(?=.*\d)[\w+/~-]+={0,2}|(?=.*\d)(?=.*[a-f])[0-9a-f]{32,}", re.ASCII)
_SUBSTITUTE = re.compile(r"key-[0-9a-f]{32}")


def _url(text: str, _before: str, _after: str, _region: str | None) -> int:
    user, _, password = text.partition(":")
    return 0 if password in ("", "...") or re.fullmatch(r"user-[0-9a-f]{8}", user) else len(text)


@functools.cache
def _plan(region: str) -> re.Pattern[str] | None:
    """What the digits of a number in this country's numbering plan begin with; None = any may.

    The matcher of phonenumbers takes half a millisecond: most numbers are turned away here, none that it would take.
    """
    known = phonenumbers.PhoneMetadata.metadata_for_region(region)
    pattern = known.general_desc.national_number_pattern if known is not None and known.general_desc else None
    if known is None or known.national_prefix_transform_rule or not pattern:
        return None
    abroad = known.international_prefix or "(?!)"
    national = known.national_prefix_for_parsing or ""
    return re.compile(f"(?:{abroad})|(?:{known.country_code})?(?:{national})?(?:{pattern})")


@functools.lru_cache(65536)
def _phone_end(text: str, region: str | None) -> int:
    if text.startswith("+"):
        try:
            number = phonenumbers.parse(text, None)
        except phonenumbers.NumberParseException:
            return 0
        return len(text) if phonenumbers.is_possible_number(number) else 0
    if region in _NORTH_AMERICA and _NANP.fullmatch(text):
        return len(text)
    if region is None or not ((plan := _plan(region)) is None or plan.match(re.sub(r"\D", "", text))):
        return 0
    leniency = phonenumbers.Leniency.STRICT_GROUPING
    for match in phonenumbers.PhoneNumberMatcher(text, region, leniency=leniency, max_tries=4):
        return match.end if match.start <= 1 else 0
    return 0


_NORTH_AMERICA = {"US", "CA"}
_NANP = re.compile(r"(?:(?:00)?1[-. ])?(?:\([2-9]\d\d\) ?|[2-9]\d\d[-.])\d{3}[-.]\d{4}(?:x\d{1,6})?")
_CALLS = re.compile(
    r"\b(?:phone|tel|telephone|telefono?|tel[eé]fono|t[eé]l[eé]phone|portable|m[oó]vil|handy|call|calling|fax|mobile?|"
    r"cell|whatsapp|sms|dial|hotline|contact|reach|desk|(?:messages?|texts?) to|answering|ring|"
    r"(?:my|his|her|their|your|our) (?:\w+ )?(?:number|registered))\b[^\n]{0,24}\n?$",
    re.IGNORECASE,
)
_CALLED = re.compile(r"[ -]{1,3}\(?(?:office|fax|mobile|cell|phone|tel|desk|home|work)\b", re.IGNORECASE)
_DECIMAL = re.compile(r"\d+\.\d+")


def _phone(text: str, before: str, after: str, region: str | None) -> int:
    digits = re.sub(r"\D", "", text)
    # 555-01xx is kept free for fiction by the North American plan; our substitutes use it. 0000 begins others.
    substitute = digits[-7:-2] == "55501" or digits.startswith("0000")
    if len(set(digits)) < 3 or substitute:
        return 0
    if end := _phone_end(text, region):
        return end
    told = _CALLS.search(before) or _CALLED.match(after)
    return len(text) if told and not _DECIMAL.fullmatch(text) else 0


_CHECKS: dict[str, Callable[[str, str, str, str | None], int]] = {
    "url_credentials": _url, "key": _key, "email": _email, "iban": _iban, "card": _card, "mac": _mac, "ip": _ip,
    "ssn": _ssn, "national_id": identities.check, "birth_date": places.birth_date, "coordinates": places.coordinates,
    "phone": _phone, "address": places.address,
}  # fmt: skip


_LOOKS = {"ip", "key", "national_id", "birth_date", "phone", "address"}


def _around(data: Any, offsets: Any, document: int, start: int, end: int) -> tuple[str, str]:
    """Text before and behind a candidate."""
    before = data[max(offsets[document], start - _BEFORE) : start].tobytes()
    after = data[end : min(end + _AFTER, offsets[document + 1])].tobytes()
    return before.decode(errors="ignore"), after.decode(errors="ignore")


def _spans(
    data: Any, offsets: Any, rows: npt.NDArray[np.int64], types: frozenset[str], region: str | None
) -> list[Span]:
    """Valid, non-overlapping spans among the candidates `rows` of one document, with places relative to it."""
    taken: list[Span] = []
    base = int(offsets[rows[0, 0]])
    bounds: list[int] = []  # starts and ends of what is taken, ascending: an even place lies between spans
    for document, start, end, kind in sorted(rows.tolist(), key=lambda r: (r[3], r[1])):
        name = kernels.TYPES[kind]
        place = bisect.bisect_right(bounds, start)
        if name not in types or place % 2 or (place < len(bounds) and bounds[place] < end):
            continue
        text = data[start:end].tobytes().decode()
        before, after = _around(data, offsets, document, start, end) if name in _LOOKS else ("", "")
        if length := _CHECKS[name](text, before, after, region):
            kept = (text + after)[:length]
            if place < len(bounds) and bounds[place] < start + len(kept.encode()):
                kept = text
            end = start + len(kept.encode())
            bounds[place:place] = [start, end]
            taken.append(Span(document, start - base, end - base, name, kept))
    return sorted(taken)


def find(text: Any, types: frozenset[str], region: str | None) -> dict[int, list[Span]]:
    """Entities in a string column: row -> spans in order, with places relative to the row's text.

    Args:
        text: an Arrow string column.
        types: which of `kernels.entities.TYPES` to look for.
        region: ISO country whose national phone format counts, or None for numbers with + only.
    """
    data, offsets = buffers(text)
    rows = kernels.candidates(data, offsets)
    found: dict[int, list[Span]] = {}
    if not len(rows):
        return found
    documents, firsts = np.unique(rows[:, 0], return_index=True)
    for document, part in zip(documents.tolist(), np.split(rows, firsts[1:]), strict=True):
        if spans := _spans(data, offsets, part, types, region):
            found[document] = spans
    return found
