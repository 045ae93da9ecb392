"""Dates of birth, coordinates and street addresses: what decides on the spans that the kernel proposes."""

from __future__ import annotations

import datetime
import re

_MONTHS = (
    "jan feb mar apr may jun jul aug sep oct nov dec mär mai okt dez janv févr mars avr juin juil août déc "
    "ene abr ago dic gen mag giu lug set ott fev abr out maj sty lut kwi cze lip sie wrz paź lis gru"
)
_NUMBERS = re.compile(r"(\d{1,4})([-/.])(\d{1,2})\2(\d{1,4})$")
_NAMED = re.compile(
    rf"(?:({'|'.join(set(_MONTHS.split()))})\w*\.? )?(\d{{1,2}})(?:st|nd|rd|th|er|º)?[., ]*(?:of |de )?"
    rf"((?:{'|'.join(set(_MONTHS.split()))})\w*)?[., ]*(?:de )?(\d{{4}})$",
    re.IGNORECASE,
)
_BORN = re.compile(
    r"(?:\b(?:birth(?:day|date)?|born|dob|geboren|geb|geburts(?:datum|tag)|née?|naissance|nacid[oa]|nacimiento|"
    r"nat[oa]|nascita|nascid[oa]|nascimento|geboortedatum|født|född|syntynyt|syntymäaika|urodzon[ya]|urodzenia|"
    r"narozen[ay]?)\b|d\.o\.b)(?:(?![.;]\s+\w+\s\w+\s\w+)[^\n]|\n(?!\n)){0,32}$",
    re.IGNORECASE,
)
NOBODY_YEAR = 1900  # substitutes are dates of this year: nobody born then is alive
_OLDEST = 1905


def birth_date(text: str, before: str, _after: str, _region: str | None) -> int:
    """Length of a date of birth; 0 when it is no date, or of a year before 1905."""
    year = _year(text)
    if year is None or not _OLDEST <= year <= datetime.date.max.year or year > 2100:
        return 0
    return len(text) if _BORN.search(before) else 0


def _year(text: str) -> int | None:
    if match := _NUMBERS.match(text):
        first, _, middle, last = match.groups()
        if len(first) == 4:
            year, parts = int(first), (int(middle), int(last))
        elif len(last) in (2, 4):
            year, parts = int(last) + (0 if len(last) == 4 else 1900), (int(first), int(middle))
        else:
            return None
        return year if min(parts) >= 1 and min(parts) <= 12 and max(parts) <= 31 else None
    if (match := _NAMED.match(text)) and (match.group(1) or match.group(3)) and 1 <= int(match.group(2)) <= 31:
        return int(match.group(4))
    return None


_PAIR = re.compile(
    r"([-+]?\d{1,3}\.\d{3,})(?:\s*°)?\s*([NSns])?[\s,;]+([-+]?\d{1,3}\.\d{3,})(?:\s*°)?\s*([EWew](?![a-z]))?"
)
_DEGREES = re.compile(
    r"\d{1,2}°\s?(?:\d{1,2}(?:\.\d+)?['′’]\s?(?:\d{1,2}(?:\.\d+)?(?:[\"″”]|''|′′)\s?)?)?[NS][,; ]{1,3}"
    r"\d{1,3}°\s?(?:\d{1,2}(?:\.\d+)?['′’]\s?(?:\d{1,2}(?:\.\d+)?(?:[\"″”]|''|′′)\s?)?)?[EWO]"
)
NOWHERE = ("-48.876", "-123.393")  # substitutes lie in the sea farthest from land


def coordinates(text: str, _before: str, _after: str, _region: str | None) -> int:
    """Length of a position in degrees, or of one axis; 0 = out of range, or one of our substitutes."""
    if match := _DEGREES.match(text):
        return match.end()
    if match := _PAIR.match(text):
        latitude, longitude = float(match.group(1)), float(match.group(3))
        substitute = match.group(1).startswith(NOWHERE[0]) and match.group(3).startswith(NOWHERE[1])
        # GeoJSON writes the longitude first.
        near, far = sorted((abs(latitude), abs(longitude)))
        return match.end() if near <= 90 and far <= 180 and not substitute else 0
    if "°" in text or text.startswith(NOWHERE):
        return 0
    return len(text) if abs(float(text)) <= 180 else 0


_ABROAD = r"[A-ZÀ-Þ][\w.'’-]+(?: [A-ZÀ-Þ][\w.'’-]+){0,3}"
_REST = re.compile(
    r"(?: [NSEW]{1,2}\b\.?)?(?:,?\s{1,3}(?:Apt|Apartment|Suite|Ste|Unit|Flat|Floor|Fl|#)\.? ?#?\w{1,6}\b)?"
    rf"(?:,?\s{{1,3}}{_ABROAD},? [A-Z]{{2}},? \d{{5}}(?:-\d{{4}})?\b"
    rf"|,?\s{{1,3}}(?:{_ABROAD},? )?[A-Z]{{1,2}}\d[\dA-Z]? \d[A-Z]{{2}}\b"
    r"|,\s{1,3}(?:[A-Z]{1,2}[- ])?\d{4,5} [A-ZÀ-Þ][\w'’-]+)?"
)
_CLEAR = re.compile(
    r"\b(?:street|st|avenue|ave|road|rd|boulevard|blvd|lane|ln|drive|dr|highway|hwy|parkway|pkwy|terrace|crescent)\.?$",
    re.IGNORECASE,
)
_LIVES = re.compile(
    r"(?:\b(?:address|lives?|living|lived|resid\w+|located|location|deliver\w*|ship\w*|mail\w*|send|sent|moved|visit|"
    r"anschrift|adresse|wohnt|wohnhaft|domicil\w*|habite|direcci[oó]n|domicilio|indirizzo|adres)\b[^\n]{0,24}\n?\s*|"
    r"\n\s*|^)$",
    re.IGNORECASE,
)
_YEAR = re.compile(r"(?:1[5-9]|20)\d\d\b")
_WHEN = re.compile(
    r"\b(?:in|since|of|from|until|by|during|year|after|before|chapter|section|figure|table|page)\s$", re.I
)
EXAMPLE = "Example Street"


def address(text: str, before: str, after: str, _region: str | None) -> int:
    """Length of a street address with what belongs to it in `after` (unit, place, code); 0 = none."""
    number_first = text[0].isdigit()
    if EXAMPLE in text or "\n" in text or (number_first and _WHEN.search(before)):
        return 0
    rest = _REST.match(after)
    more = rest.end() if rest else 0
    if number_first and _YEAR.match(text) and not more and not _LIVES.search(before):
        return 0
    clear = bool(_CLEAR.search(text)) or not number_first
    if not (clear or more or _LIVES.search(before)):
        return 0
    return len(text) + more
