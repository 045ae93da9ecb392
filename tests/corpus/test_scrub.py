"""Scrubbing: planted entities of every type, look-alikes that must stay, the four actions, and no leaks."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import re2
from hypothesis import given, settings
from hypothesis import strategies as st
from stdnum import iban, luhn

from modelyard.corpus.entities import find
from modelyard.corpus.kernels.entities import TYPES
from modelyard.corpus.options import ScrubOptions
from modelyard.corpus.pseudonym import VARIABLE, Pseudonyms
from modelyard.corpus.step import split
from modelyard.corpus.steps.scrub import Scrub
from modelyard.errors import RecipeError

KEY = "a test key of sixteen bytes and more"
PRIVATE = "-----BEGIN RSA PRIVATE KEY-----\n" + "MIIEowIBAAKCAQEA7bq3\n" * 8 + "-----END RSA PRIVATE KEY-----"

PLANTED = {
    "email": ["john.smith@acme-corp.com", "a.b+tag@mail.uni-bonn.de", "X_Y@sub.domain.co.uk"],
    "phone": ["(212) 555-2368", "+44 20 7946 0958", "+49 30 901820", "415-555-2671", "+1 650-253-0000"],
    "ip": ["8.8.4.4", "93.184.216.34", "2606:2800:220:1:248:1893:25c8:1946", "2a00:1450:4001:81b::200e"],
    "key": ["AKIAQ3EGR5XYZTUV7K2M", "ghp_9fK2mQ7xZ1vB4nT8rW3yL6cH5jD0sGpA2eUi",
            "xoxb-2917365-8812749301-Qk3Zr7Lw", PRIVATE],
    "url_credentials": ["admin:Tr0ub4dor3", "deploy:h7Gk2pQ"],
    "card": ["4111 1111 1111 1111", "5500-0055-5555-5559", "378282246310005", "6011000990139424"],
    "iban": ["DE89 3704 0044 0532 0130 00", "GB29NWBK60161331926819", "FR14 2004 1010 0505 0001 3M02 606"],
    "ssn": ["536-22-1187", "219 09 9999"],
    "mac": ["00:1b:63:84:45:e6", "3C-07-54-1A-2B-9F"],
}  # fmt: skip
FRAMES = ["Write to {} please.", "({})", "see {}, or not", "{}", "value: {}\nnext line", "é {} ü"]


def planted(kind: str, value: str, frame: str) -> str:
    return frame.format(f"https://{value}@host.net/x" if kind == "url_credentials" else value)


def found(text: str) -> list[tuple[str, str]]:
    spans = find(pa.array([text]), frozenset(TYPES), "US")
    return [(span.type, span.text) for span in spans.get(0, [])]


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize(("kind", "value"), [(k, v) for k, values in PLANTED.items() for v in values])
def test_every_planted_entity_is_found_and_nothing_else(kind: str, value: str, frame: str) -> None:
    assert found(planted(kind, value, frame)) == [(kind, value)]


@pytest.mark.parametrize(
    "text",
    [
        "version 1.2.3.4 and numpy==1.26.4.1", "10.0.0.1 192.168.1.10 127.0.0.1 255.255.255.0 0.0.0.0", "1.2.3",
        "std::vector<int> a::b", "12:34:56 on 2021-10-11 12:30", "2014-06-10 and 10/11/2012 and 1999-2003",
        "4111 1111 1111 1112", "1234567890123456", "0000 0000 0000 0000", "DE89 3704 0044 0532 0130 01", "AB12 of 3",
        "000-12-3456 666-12-3456 912-12-3456", "@decorator and foo@bar and a@b.c", "git@github.com:org/repo.git",
        "icon@2x.png", "user@example.com", "password = os.environ['PASSWORD']", 'password="changeme123"',
        'token = "<your-token-here>"', "sk-learn and ghp_short", "http://host:8080/path", "ISBN 978-3-16-148410-0",
        "1 2 3 4 5 6 7 8 9 10", "00:00:00:00:00:00", "6.5.4.3.2.1", "3.14159265358979", "(555) 555-0123",
    ],
)  # fmt: skip
def test_look_alikes_stay(text: str) -> None:
    assert found(text) == []


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="ab@.-+:/ 0123456789é\n", max_size=60))
def test_spans_lie_in_the_text_and_do_not_overlap(text: str) -> None:
    raw = text.encode()
    spans = find(pa.array(["padding 8.8.4.4", text]), frozenset(TYPES), "US").get(1, [])
    end = 0
    for span in spans:
        assert span.start >= end and raw[span.start : span.end].decode() == span.text
        end = span.end


def test_candidates_cover_what_regular_expressions_find() -> None:
    """A scan by RE2 is an independent witness for the kernel's e-mail, IPv4 and MAC forms."""
    rng = random.Random(3)
    parts = ["mail", "a.b", "@", ".", "x.org", "10", "255", ":", "1b", "-", " ", "8.8", "\n", "com", "é"]
    email = re2.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}[A-Za-z0-9]@(?:[a-z0-9]+\.)+[a-z]{2,6}")
    for _ in range(3000):
        text = "".join(rng.choice(parts) for _ in range(12))
        match = email.search(text)
        if match is None or ".." in match.group() or "é" in text or "example" in text:
            continue
        end = match.end()
        if end < len(text) and (text[end].isalnum() or text[end] in ".-@"):
            continue
        assert any(kind in ("email", "url_credentials") for kind, _ in found(text)), text


def scrub(texts: list[str], **options: Any) -> tuple[list[str], Scrub]:
    step = Scrub(ScrubOptions(**options))
    table = pa.table({"id": [str(n) for n in range(len(texts))], "text": texts})
    return split(step(table))[0]["text"].to_pylist(), step


def test_redact_writes_typed_placeholders() -> None:
    texts, step = scrub(["Ask john.smith@acme-corp.com or 8.8.4.4.", "nothing here"])
    assert texts == ["Ask [EMAIL] or [IP].", "nothing here"]
    assert dict(step.counts) == {"email/redact": 1, "ip/redact": 1}


def test_mask_keeps_the_length() -> None:
    assert scrub(["Call (212) 555-2368 now"], phone="mask")[0] == ["Call ************** now"]


def test_null_leaves_a_type_alone() -> None:
    assert scrub(["john.smith@acme-corp.com at 8.8.4.4"], email=None)[0] == ["john.smith@acme-corp.com at [IP]"]


def test_drop_removes_the_document_with_a_reason(documents: Any) -> None:
    kept, removed = split(Scrub(ScrubOptions(ssn="drop"))(documents("SSN 536-22-1187 of john@acme.com", "clean")))
    assert kept["text"].to_pylist() == ["clean"]
    assert removed["reason"].to_pylist() == ["scrub_ssn"]


def test_pseudonyms_are_the_same_everywhere_and_under_another_key_different(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = "john.smith@acme-corp.com wrote to JOHN.SMITH@acme-corp.com and jane@acme-corp.com"
    monkeypatch.setenv(VARIABLE, KEY)
    first, _ = scrub([text], email="pseudonymize")
    again, _ = scrub(["x", text], email="pseudonymize")
    assert first[0] == again[1] and "acme" not in first[0]
    words = first[0].split()
    assert words[0] == words[3] != words[5] and words[0].endswith("@example.org")
    (tmp_path / "key").write_text("another key of sixteen bytes")
    other, _ = scrub([text], email="pseudonymize", key_file=str(tmp_path / "key"))
    assert other[0] != first[0]


@pytest.mark.parametrize("kind", list(PLANTED))
def test_a_substitute_is_not_taken_for_personal_data_again(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, KEY)
    texts = [planted(kind, value, frame) for value in PLANTED[kind] for frame in FRAMES]
    actions = dict.fromkeys(PLANTED, "pseudonymize")
    once, step = scrub(texts, **actions)
    assert once != texts
    twice, again = scrub(once, **actions)
    assert twice == once and not again.counts
    table = pa.table({"id": [str(n) for n in range(len(once))], "text": once})
    assert step.leaks(table) == []


def test_a_missing_or_short_key_is_one_clear_error_without_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(RecipeError, match="needs a secret key, and it is missing") as raised:
        Scrub(ScrubOptions(email="pseudonymize"))
    assert VARIABLE in str(raised.value)
    monkeypatch.setenv(VARIABLE, "shhh")
    with pytest.raises(RecipeError) as raised:
        Scrub(ScrubOptions(email="pseudonymize"))
    assert "shhh" not in str(raised.value)
    with pytest.raises(RecipeError, match="cannot be read"):
        Scrub(ScrubOptions(email="pseudonymize", key_file="/nowhere/key"))


def test_generated_numbers_with_valid_checksums_are_found() -> None:
    rng = random.Random(11)
    for _ in range(200):
        body = "4" + "".join(rng.choice("0123456789") for _ in range(14))
        card = body + luhn.calc_check_digit(body)
        assert found(f"card {card}.") == [("card", card)]
    account = "".join(rng.choice("0123456789") for _ in range(18))
    number = "DE" + iban.calc_check_digits("DE00" + account) + account
    assert found(f"to {number}, today") == [("iban", number)]


def test_substitutes_come_from_ranges_that_belong_to_nobody() -> None:
    make = Pseudonyms(KEY.encode())
    assert make("ip", "8.8.4.4").startswith(("198.18.", "198.19."))
    assert make("ip", "2606::1").startswith("2001:db8::")
    assert make("mac", "00:1b:63:84:45:e6").startswith("02:")
    assert "555-01" in make("phone", "+1 650-253-0000")
    assert make("card", "4111 1111 1111 1111") == make("card", "4111111111111111")


def test_prompts_are_scrubbed_too(documents: Any) -> None:
    table = Scrub(ScrubOptions())(documents("text", prompt=["def mail(to='john.smith@acme-corp.com'):"]))
    assert table["prompt"].to_pylist() == ["def mail(to='[EMAIL]'):"]
    assert table["entities"].to_pylist() == [1]
