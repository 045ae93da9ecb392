"""Scrubbing: planted entities of every type, look-alikes that must stay, the four actions, and no leaks."""

from __future__ import annotations

import json
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
from modelyard.corpus.filter_options import ENTITIES, ScrubOptions
from modelyard.corpus.identities import IDENTITIES
from modelyard.corpus.kernels.context import IDENTITY, WORDS
from modelyard.corpus.kernels.entities import TYPES
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


IN_CONTEXT = [
    ("birth_date", "12 March 1985", "He was born on {} in Rome."), ("birth_date", "1985-03-12", "Date of birth: {}."),
    ("birth_date", "3/4/85", "DOB {}"), ("birth_date", "12. März 1985", "geboren am {} in Ulm"),
    ("birth_date", "March 12, 1985", "was born {}, they say"),
    ("birth_date", "11/3/1995", "your date of birth. It's {}"),
    ("coordinates", "40.71280, -74.00600", "located at {} exactly"), ("coordinates", "40.7128", "lat: {};"),
    ("coordinates", "40.7128° N, 74.0060° W", "found {} today"), ("coordinates", "40°26′46″N 79°58′56″W", "at {}"),
    ("coordinates", "40.7128,-74.0060", "https://maps.google.com/?q={}"),
    ("coordinates", "-120.650175, 41.850385", '"coordinates": [{}]'),
    ("address", "221 Baker Street, London NW1 6XE", "She lives at {}."), ("address", "Via Roma 10", "abita in {}."),
    ("address", "1600 Pennsylvania Avenue NW, Washington, DC 20500", "ship to {} now"),
    ("address", "5 rue de la Paix, 75002 Paris", "habite {}"), ("address", "Hauptstraße 5, 10115 Berlin", "wohnt {}."),
    ("address", "12 Elm St. Apt 4", "see {}"), ("national_id", "RSSMRA85T10A562S", "codice fiscale {}."),
    ("national_id", "390.533.447-05", "number {} here"), ("national_id", "X2482300W", "NIE: {}"),
    ("national_id", "54362315K", "mi DNI es {}"), ("national_id", "533380006", "passport no. {}"),
    ("national_id", "2 95 10 99 126 111 93", "Sécu {}"), ("national_id", "943 476 5870", "NHS number {}"),
    ("national_id", "111222333", "BSN {},"), ("national_id", "131052-308T", "hetu {}"),
    ("national_id", "ABCPV1234D", "PAN {}"), ("national_id", "AB 12 34 56 C", "national insurance no {}"),
    ("national_id", "F162823540116", "my driver's license number is {}"), ("phone", "416 60 039", "{} office"),
    ("phone", "085 175 7641", "{}-Office"), ("phone", "21 284 698 2548", "Phone:\n{}"),
    ("iban", "gb42nawi04454264788619", "my iban is {}"),
    ("key", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYzzzzKEY9q", "aws_secret_access_key={}"),
    ("key", "q8Zt3LkPw0aB7cXyR5mN", "Authorization: Bearer {}"),
    ("key", "9f86d081884c7d659a2feaa0c55ad015", "token={}\n"),
    ("key", "hooks.slack.com/services/T01ABCDEF/B02GHIJKL/q8Zt3LkPw0aB7cXyR5mN2vQs", "https://{}"),
]  # fmt: skip


def planted(kind: str, value: str, frame: str) -> str:
    return frame.format(f"https://{value}@host.net/x" if kind == "url_credentials" else value)


def found(text: str) -> list[tuple[str, str]]:
    spans = find(pa.array([text]), frozenset(TYPES), "US")
    return [(span.type, span.text) for span in spans.get(0, [])]


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize(("kind", "value"), [(k, v) for k, values in PLANTED.items() for v in values])
def test_every_planted_entity_is_found_and_nothing_else(kind: str, value: str, frame: str) -> None:
    assert found(planted(kind, value, frame)) == [(kind, value)]


def test_what_is_personal_only_in_its_context_is_found_there() -> None:
    wrong = {f: found(f.format(v)) for k, v, f in IN_CONTEXT if found(f.format(v)) != [(k, v)]}
    assert wrong == {}
    # The same values behind a word that tells nothing are left alone, where only the context told.
    told = {"birth_date", "national_id"}
    alone = {"RSSMRA85T10A562S", "390.533.447-05", "2 95 10 99 126 111 93", "131052-308T"}
    plain = [v for k, v, _ in IN_CONTEXT if k in told and v not in alone]
    assert {v: found(f"see {v} .") for v in plain if any(k in told for k, _ in found(f"see {v} ."))} == {}


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
        "In 2010 Main Street was", "Chapter 3 The Long Way", "[0.1234, 0.5678]", "1.0000 2.0000", "see 3 Drive A",
        "token = request.headers.get_value", "password: correct-horse-battery", "born 1985-99-99", "at 91.123, 181.456",
        "The licence 1234567 of version 2", "commit 9f86d081884c7d659a2feaa0c55ad015", "DNI 54362315A", "BSN 111222334",
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


def test_meta_stays_json_and_source_is_scrubbed_when_asked_for(documents: Any) -> None:
    meta = {"by": "é\njohn@acme-corp.com", "card": 4111111111111111, "gps": {"lat": 40.7128}, "n": 7, "q": 'a"b'}
    table = documents("x").set_column(3, "meta", [[json.dumps(meta)]])
    table = table.set_column(2, "source", [["s3://b/jane@acme-corp.com/1.txt"]])
    step = Scrub(ScrubOptions(columns=("text", "meta", "source")))
    result = step(table)
    cleaned = json.loads(result["meta"][0].as_py())
    assert cleaned == {
        "by": "é\n[EMAIL]", "card": "[CARD]", "gps": {"lat": "[COORDINATES]"}, "n": 7, "q": 'a"b'
    }  # fmt: skip
    assert result["source"][0].as_py() == "s3://b/[EMAIL]/1.txt"
    assert step.leaks(result) == [] and len(step.leaks(table)) == 4


@settings(max_examples=60, deadline=None)
@given(
    st.recursive(
        st.text(alphabet='a"\\\n é', max_size=6) | st.integers() | st.sampled_from(["j@acme.com", 4111111111111111]),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=8,
    ),
    st.booleans(),
)
def test_scrubbed_meta_always_parses(value: Any, ascii_only: bool) -> None:
    step = Scrub(ScrubOptions(columns=("meta",)))
    result = step.rewrite(pa.array([json.dumps(value, ensure_ascii=ascii_only)]), column="meta")[0].as_py()
    json.loads(result)
    assert "acme" not in result and "4111111111111111" not in result and not step.counts["meta/cleared"]


def test_every_word_that_an_identity_wants_wakes_the_kernel() -> None:
    known = set(WORDS[IDENTITY].split())
    plain = {w for i in IDENTITIES for w in i.words.split() if not set("\\(") & set(w)}
    assert plain <= known


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


def test_substitutes_of_what_context_tells_are_not_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, KEY)
    texts = [frame.format(value) for _, value, frame in IN_CONTEXT]
    once, step = scrub(texts, **dict.fromkeys(ENTITIES, "pseudonymize"))
    assert all(a != b for a, b in zip(once, texts, strict=True))
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
