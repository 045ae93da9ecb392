"""Candidates for personal data and secrets: one pass over the bytes that stops only at trigger bytes.

The kernel proposes spans by form; `modelyard.corpus.entities` decides by checksum and context. Spans of
different types may overlap; a later choice takes the more specific one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from modelyard.corpus.kernels import kernel
from modelyard.corpus.kernels.forms import ALPHA, DIGIT, FORMS, HEX, LOCAL, TOKEN, UPPER, has, run_end
from modelyard.corpus.kernels.keys import ANCHORS, PREFIXES, assigned, prefixed, private
from modelyard.corpus.kernels.persons import address, called, coordinates, date, identity

# In the order in which they claim a place: the more specific before the looser.
TYPES = (
    "url_credentials", "key", "email", "iban", "card", "mac", "ip", "ssn", "national_id", "birth_date", "coordinates",
    "phone", "address",
)  # fmt: skip
URL, KEY, EMAIL, IBAN, CARD, MAC, IP, SSN, IDENTITY, BIRTH, POSITION, PHONE, ADDRESS = range(len(TYPES))

# What to do at a byte that can stand in or begin an entity: any of these.
_T_AT, _T_COLON, _T_DIGIT, _T_EQUALS, _T_DASH, _T_PREFIX = 1, 2, 4, 8, 16, 32


TRIGGERS = np.zeros(256, np.uint8)
for _char, _code in ((b"@", _T_AT), (b":", _T_COLON), (b"0123456789", _T_DIGIT), (b"=", _T_EQUALS), (b"-", _T_DASH)):
    TRIGGERS[list(_char)] = _code
TRIGGERS[list({prefix[place] for (prefix, _), place in zip(PREFIXES, ANCHORS, strict=True)})] |= _T_PREFIX


_DATE_MARKS = tuple(b"-/.")


@kernel
def _email(data: Any, i: Any, start: Any, end: Any, forms: Any) -> Any:
    """Span of an address around the @ at i; (0, 0) = none."""
    left = i
    while left > start and i - left < 64 and forms[data[left - 1]] & LOCAL:
        left -= 1
    while left < i and data[left] in (0x2E, 0x2D, 0x25, 0x2B):
        left += 1
    right, dots, label = i + 1, 0, i + 1
    while right < end and right - i < 255:
        byte = data[right]
        if byte == 0x2E and right > label:
            # A dot belongs to the domain only when a label follows.
            if not has(data, right + 1, start, end, forms, DIGIT | ALPHA):
                break
            dots += 1
            label = right + 1
        elif not (forms[byte] & (DIGIT | ALPHA) or (byte == 0x2D and right > label)):
            break
        right += 1
    last = run_end(data, label, right, forms, ALPHA)
    if left == i or data[i - 1] == 0x2E or dots == 0 or last - label < 2 or last < right:
        return 0, 0
    return left, right


@kernel
def _url(data: Any, i: Any, start: Any, end: Any, forms: Any) -> Any:
    """Span of user:password behind the :// at i; (0, 0) = none."""
    if not (i + 3 < end and data[i + 1] == 0x2F and data[i + 2] == 0x2F):
        return 0, 0
    if not has(data, i - 1, start, end, forms, ALPHA | DIGIT):
        return 0, 0
    colon = -1
    for k in range(i + 3, min(end, i + 259)):
        byte = data[k]
        if byte == 0x40:
            return (i + 3, k) if colon > i + 3 and k > colon + 1 else (0, 0)
        if byte == 0x3A and colon < 0:
            colon = k
        elif byte <= 0x20 or byte == 0x2F or byte == 0x22 or byte == 0x27 or byte == 0x3C or byte == 0x3E:
            return 0, 0
    return 0, 0


@kernel
def _colons(data: Any, i: Any, start: Any, end: Any, forms: Any) -> Any:
    """(type, start, end) of an IPv6 or MAC address whose first colon is at i; type -1 = none."""
    if i + 1 >= end or not (forms[data[i + 1]] & HEX or data[i + 1] == 0x3A):
        return -1, 0, 0
    left = i
    while left > start and i - left < 5 and forms[data[left - 1]] & HEX:
        left -= 1
    if i - left > 4 or has(data, left - 1, start, end, forms, TOKEN) or (left > start and data[left - 1] == 0x3A):
        return -1, 0, 0
    right, colons, double, group, groups = left, 0, False, 0, 0
    pairs, digits = True, False
    while right < end and right - left < 46:
        byte = data[right]
        if byte == 0x3A:
            pairs = pairs and group == 2
            groups += group > 0
            colons += 1
            double = double or (right + 1 < end and data[right + 1] == 0x3A)
            group = 0
        elif forms[byte] & HEX:
            group += 1
            digits = digits or forms[byte] & DIGIT
        elif not (byte == 0x2E and colons >= 2 and has(data, right + 1, start, end, forms, DIGIT)):
            break
        else:
            group = 0
        right += 1
    groups += group > 0
    if has(data, right, start, end, forms, TOKEN) or not digits:
        return -1, 0, 0
    if data[right - 1] == 0x3A and not (right - left >= 2 and data[right - 2] == 0x3A):
        right -= 1
        colons -= 1
    if colons == 5 and pairs and group == 2 and not double:
        return MAC, left, right
    if (colons == 7 or (double and colons >= 2)) and groups >= 2 and right - left >= 6:
        return IP, left, right
    return -1, 0, 0


@kernel
def _dashes(data: Any, i: Any, start: Any, end: Any, forms: Any) -> Any:
    """Span of a MAC address written with dashes whose first dash is at i; (0, 0) = none."""
    left, right = i - 2, i + 15
    if left < start or right > end or data[i + 3] != 0x2D:
        return 0, 0
    if has(data, left - 1, start, end, forms, TOKEN) or has(data, right, start, end, forms, TOKEN):
        return 0, 0
    for k in range(left, right):
        dash = (k - left) % 3 == 2
        if dash != (data[k] == 0x2D) or (not dash and not forms[data[k]] & HEX):
            return 0, 0
    return left, right


@kernel
def _ipv4(data: Any, i: Any, start: Any, end: Any, forms: Any) -> Any:
    """End of a dotted quad that begins at digit i; 0 = none."""
    k = i
    for octet in range(4):
        value, digits = 0, 0
        while k < end and forms[data[k]] & DIGIT and digits < 4:
            value = value * 10 + data[k] - 48
            digits += 1
            k += 1
        if digits == 0 or digits > 3 or value > 255:
            return 0
        if octet < 3:
            if k >= end or data[k] != 0x2E:
                return 0
            k += 1
    if has(data, k, start, end, forms, DIGIT | ALPHA):
        return 0
    if k + 1 < end and (data[k] == 0x2E or data[k] == 0x2D) and forms[data[k + 1]] & (DIGIT | ALPHA):
        return 0
    if i > start and (data[i - 1] == 0x2E or data[i - 1] == 0x2D):
        return 0
    return k


@kernel
def _card(data: Any, i: Any, start: Any, end: Any, forms: Any) -> Any:
    """End of 12 to 19 digits, singly separated by blanks or dashes, that satisfy Luhn (ISO/IEC 7812); 0 = none."""
    digits = np.empty(20, np.int64)
    n, k, last = 0, i, i
    while k < end and n < 20:
        byte = data[k]
        if forms[byte] & DIGIT:
            digits[n] = byte - 48
            n += 1
            last = k + 1
        elif not ((byte == 0x20 or byte == 0x2D) and k == last and n % 2 == 0):
            break
        k += 1
    if n < 12 or n > 19 or has(data, last, start, end, forms, DIGIT | ALPHA):
        return 0
    total = 0
    for j in range(n):
        value = digits[n - 1 - j] * (1 + j % 2)
        total += value - 9 if value > 9 else value
    return last if total % 10 == 0 else 0


@kernel
def _ssn(data: Any, i: Any, start: Any, end: Any, forms: Any) -> Any:
    """End of ddd-dd-dddd (or with blanks) at i; 0 = none."""
    if i + 11 > end or has(data, i + 11, start, end, forms, TOKEN):
        return 0
    mark = data[i + 3]
    if not (mark == 0x2D or mark == 0x20) or data[i + 6] != mark:
        return 0
    for k in range(11):
        if k != 3 and k != 6 and not forms[data[i + k]] & DIGIT:
            return 0
    return i + 11


@kernel
def _calendar(data: Any, i: Any, end: Any, forms: Any) -> Any:
    """Whether data[i:end] begins with a date, year first: 2024-05-01, 2024/5/1."""
    if i + 8 > end or not (data[i + 4] in _DATE_MARKS and run_end(data, i, end, forms, DIGIT) == i + 4):
        return False
    k = run_end(data, i + 5, end, forms, DIGIT)
    return 1 <= k - i - 5 <= 2 and k + 1 < end and data[k] in _DATE_MARKS and forms[data[k + 1]] & DIGIT != 0


@kernel
def _phone(data: Any, i: Any, start: Any, end: Any, forms: Any) -> Any:
    """Span of 7 to 15 digits in groups, or any with + before it; (0, 0) = none."""
    left = i
    if left > start and data[left - 1] == 0x28:
        left -= 1
    plus = left > start and data[left - 1] == 0x2B
    if plus:
        left -= 1
    if has(data, left - 1, start, end, forms, TOKEN) or (left > start and data[left - 1] in (0x2E, 0x2F, 0x3D)):
        return 0, 0
    k, last, digits, groups, gap, paren = i, i, 0, 1, 0, i
    while k < end and digits <= 15:
        byte = data[k]
        if forms[byte] & DIGIT:
            groups += gap > 0
            gap = 0
            digits += 1
            last = k + 1
        elif byte in (0x20, 0x2D, 0x2E, 0x28, 0x29, 0x2F) and gap < 3:
            gap += 1
            paren = k if byte == 0x29 and paren == i else paren
        else:
            break
        k += 1
    if not plus and not i < paren < last:
        left = i
    if digits < 7 or digits > 15 or (left == i and _calendar(data, i, last, forms)):
        return 0, 0
    if not plus and groups == 1 and not (digits >= 9 and called(data, left, last, start, end, forms)):
        return 0, 0
    if has(data, last, start, end, forms, ALPHA):
        tail = run_end(data, last + 1, end, forms, DIGIT)
        if data[last] != 0x78 or tail == last + 1:
            return 0, 0
        last = tail
    return left, last


@kernel
def _iban(data: Any, i: Any, start: Any, end: Any, forms: Any) -> Any:
    """Span that may begin with an IBAN whose check digits are at i; (0, 0) = none."""
    if i - 2 < start or not (forms[data[i - 1]] & ALPHA and forms[data[i - 2]] & ALPHA):
        return 0, 0
    if (forms[data[i - 1]] ^ forms[data[i - 2]]) & UPPER:
        return 0, 0
    if has(data, i - 3, start, end, forms, TOKEN) or not has(data, i + 1, start, end, forms, DIGIT):
        return 0, 0
    k, count = i + 2, 4
    while k < end and count < 34:
        if forms[data[k]] & (DIGIT | ALPHA):
            count += 1
        elif not ((data[k] == 0x20 or data[k] == 0x2D) and has(data, k + 1, start, end, forms, DIGIT | ALPHA)):
            break
        k += 1
    return (i - 2, k) if count >= 15 else (0, 0)


@kernel
def _emit(out: Any, used: Any, d: Any, start: Any, end: Any, kind: Any) -> Any:
    """Writes a span where there is room for it; returns the number of spans so far."""
    if end > start:
        if used < len(out):
            out[used, 0], out[used, 1], out[used, 2], out[used, 3] = d, start, end, kind
        return used + 1
    return used


@kernel
def _number(data: Any, i: Any, start: Any, end: Any, forms: Any, d: Any, out: Any, used: Any) -> Any:
    """Everything that begins with a number at i, whose previous byte is no digit.

    Most numbers are short and stand alone (a year, a page): what `last` and the two bytes behind it rule out is
    not looked for.
    """
    last = run_end(data, i, end, forms, DIGIT)
    size, mark = last - i, data[last] if last < end else 0
    word = has(data, i - 1, start, end, forms, ALPHA)
    if word:
        left, right = _iban(data, i, start, end, forms)
        used = _emit(out, used, d, left, right, IBAN)
    # A digit behind at most three blanks and marks: part of the same number, perhaps.
    more = has(data, last + 1, start, end, forms, DIGIT) or (
        not has(data, last, start, end, forms, ALPHA)
        and (has(data, last + 2, start, end, forms, DIGIT) or has(data, last + 3, start, end, forms, DIGIT))
    )
    if size >= 4 or more or has(data, last, start, end, forms, UPPER) or has(data, last + 1, start, end, forms, UPPER):
        left, right = identity(data, i, start, end, forms)
        used = _emit(out, used, d, left, right, IDENTITY)
    if word or (i > start and data[i - 1] == 0x5F):
        return used
    if more or size >= 7:
        used = _long(data, i, start, end, forms, d, out, used, last)
    if size <= 4 and mark:
        left, right = date(data, i, start, end, forms)
        used = _emit(out, used, d, left, right, BIRTH)
    if mark == 0x2E or mark == 0xC2:
        left, right = coordinates(data, i, start, end, forms)
        used = _emit(out, used, d, left, right, POSITION)
    if size <= 5:
        left, right = address(data, i, start, end, forms)
        used = _emit(out, used, d, left, right, ADDRESS)
    return used


@kernel
def _long(data: Any, i: Any, start: Any, end: Any, forms: Any, d: Any, out: Any, used: Any, last: Any) -> Any:
    """Numbers of several groups, or of one long one, whose first group ends at `last`."""
    size, mark = last - i, data[last] if last < end else 0
    if size <= 3 and mark == 0x2E:
        used = _emit(out, used, d, i, _ipv4(data, i, start, end, forms), IP)
    if size >= 12 or has(data, last + 1, start, end, forms, DIGIT):
        used = _emit(out, used, d, i, _card(data, i, start, end, forms), CARD)
    if size == 3 and not (i > start and data[i - 1] in (0x2D, 0x2E)):
        used = _emit(out, used, d, i, _ssn(data, i, start, end, forms), SSN)
    left, right = _phone(data, i, start, end, forms)
    return _emit(out, used, d, left, right, PHONE)


@kernel
def _mark(data: Any, i: Any, start: Any, end: Any, forms: Any, trigger: Any, d: Any, out: Any, used: Any) -> Any:
    """Everything that a mark at i (@ : = -) may be part of."""
    if trigger & _T_AT:
        left, right = _email(data, i, start, end, forms)
        return _emit(out, used, d, left, right, EMAIL)
    if trigger & _T_DASH:
        left, right = _dashes(data, i, start, end, forms)
        used = _emit(out, used, d, left, right, MAC)
        if i == start or data[i - 1] != 0x2D:
            used = _emit(out, used, d, i, private(data, i, end), KEY)
        return used
    if trigger & _T_COLON:
        left, right = _url(data, i, start, end, forms)
        used = _emit(out, used, d, left, right, URL)
        kind, left, right = _colons(data, i, start, end, forms)
        used = _emit(out, used, d, left, right, kind)
    left, right = assigned(data, i, start, end, forms)
    return _emit(out, used, d, left, right, KEY)


@kernel
def scan(data: Any, offsets: Any, forms: Any, triggers: Any, out: Any) -> Any:
    """Writes spans that may be personal data to `out` and returns how many there are.

    Args:
        data, offsets: valid UTF-8 of the documents.
        forms, triggers: FORMS and TRIGGERS.
        out: int64 [room, 4]: document, start and end in `data`, type. When there are more spans than
            room the rest is counted only: call again with a larger array.
    """
    used = 0
    for d in range(len(offsets) - 1):
        start, end = offsets[d], offsets[d + 1]
        for i in range(start, end):
            trigger = triggers[data[i]]
            if trigger == 0:
                continue
            if trigger & _T_PREFIX:
                left, right = prefixed(data, i, start, end, forms)
                used = _emit(out, used, d, left, right, KEY)
            if trigger & _T_DIGIT:
                if not has(data, i - 1, start, end, forms, DIGIT):
                    used = _number(data, i, start, end, forms, d, out, used)
            elif trigger != _T_PREFIX:
                used = _mark(data, i, start, end, forms, trigger, d, out, used)
    return used


def candidates(data: Any, offsets: Any) -> npt.NDArray[np.int64]:
    """Spans that may be personal data, int64 [spans, 4], in document order. See `scan`."""
    # Enough for one in 100 bytes (pages that are not touched cost nothing): a second scan is for lists of numbers.
    out = np.empty((max(1024, int(offsets[-1] - offsets[0]) // 100), 4), np.int64)
    while (found := scan(data, offsets, FORMS, TRIGGERS, out)) > len(out):
        out = np.empty((found, 4), np.int64)
    return out[:found]
