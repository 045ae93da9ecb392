"""National identity numbers: forms, check digits (python-stdnum) and the words that must stand nearby.

A number whose form and check digits are all but impossible by chance stands on its own (`alone`); any
other needs one of its country's own words before it. Numbers without check digits (passports, driving
licences, British national insurance) always need the word.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass

_END = r"(?![0-9A-Za-z])(?![-./][0-9])"


@dataclass(frozen=True)
class Identity:
    """One kind of number.

    Attributes:
        country: ISO code, or "" for several.
        form: regular expression of the number.
        words: any of these, lower case, must stand before it.
        check: module of python-stdnum whose `is_valid` decides; "" = the form alone.
        alone: regular expression of the form that needs no word; "" = none.
    """

    country: str
    form: str
    words: str
    check: str = ""
    alone: str = ""


_RUN11 = r"\d{11}"
IDENTITIES = (
    Identity("AT", r"\d{4} ?\d{6}", "sozialversicherungsnummer svnr vsnr versicherungsnummer", "at.vnr"),
    Identity("AU", r"\d{3} ?\d{3} ?\d{3}", "tfn", "au.tfn"),
    Identity("BE", r"\d\d\.?\d\d\.?\d\d[- ]?\d{3}\.?\d\d", "rijksregisternummer niss insz nn registre national",
             "be.nn", r"\d\d\.\d\d\.\d\d-\d{3}\.\d\d"),
    Identity("BG", r"\d{10}", "egn егн", "bg.egn"),
    Identity("BR", r"\d{3}\.?\d{3}\.?\d{3}-?\d\d", "cpf contribuinte", "br.cpf", r"\d{3}\.\d{3}\.\d{3}-\d\d"),
    Identity("CA", r"\d{3}[- ]?\d{3}[- ]?\d{3}", "sin social insurance", "ca.sin"),
    Identity("CH", r"756\.?\d{4}\.?\d{4}\.?\d\d", "ahv avs", "ch.ssn", r"756\.\d{4}\.\d{4}\.\d\d"),
    Identity("CL", r"\d{1,2}\.?\d{3}\.?\d{3}-[\dK]", "rut", "cl.rut"),
    Identity("CN", r"\d{17}[\dX]", "identity resident 身份证 身份证号 身份证号码", "cn.ric", r"\d{17}[\dX]"),
    Identity("CZ", r"\d{6}/?\d{3,4}", "rodné rodne", "cz.rc"),
    Identity("DE", r"\d\d ?\d{3} ?\d{3} ?\d{3}", "steuer steuerid idnr identifikationsnummer tin steuernummer "
             "steueridentifikationsnummer", "de.idnr"),
    Identity("DK", r"\d{6}-?\d{4}", "cpr personnummer", "dk.cpr"),
    Identity("EE", _RUN11, "isikukood", "ee.ik"),
    Identity("ES", r"\d{8}-?[A-Z]", "dni nif identidad", "es.dni"),
    Identity("ES", r"[XYZ]-?\d{7}-?[A-Z]", "nie nif extranjero identidad", "es.nie"),
    Identity("FI", r"\d{6}[-+A-FU-Y]\d{3}[0-9A-Y]", "hetu henkilötunnus", "fi.hetu", r"\d{6}[-+A]\d{3}[0-9A-Y]"),
    Identity("FR", r"[12] ?\d\d ?\d\d ?\d[\dAB] ?\d{3} ?\d{3} ?\d\d", "nir insee sécu sécurité securite sociale",
             "fr.nir", r"[12] ?\d\d ?(?:0[1-9]|1[0-2]) ?\d[\dAB] ?\d{3} ?\d{3} ?\d\d"),
    Identity("GB", r"\d{3}[- ]?\d{3}[- ]?\d{4}", "nhs nhsnumber", "gb.nhs"),
    Identity("GB", r"(?!BG|GB|KN|NK|NT|TN|ZZ)[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z] ?\d\d ?\d\d ?\d\d ?[A-D]",
             "nino national insurance ni"),
    Identity("GR", _RUN11, "amka αμκα", "gr.amka"),
    Identity("HR", _RUN11, "oib", "hr.oib"),
    Identity("ID", r"\d{16}", "nik", "id.nik"),
    Identity("IE", r"\d{7}[A-W][A-IW]?", "pps ppsn", "ie.pps"),
    Identity("IN", r"[2-9]\d{3}[ -]?\d{4}[ -]?\d{4}", "aadhaar aadhar", "in_.aadhaar"),
    Identity("IN", r"[A-Z]{5}\d{4}[A-Z]", "pan", "in_.pan"),
    Identity("IS", r"\d{6}-?\d{4}", "kennitala", "is_.kennitala"),
    Identity("IT", r"[A-Z]{6}[\dLMNP-V]{2}[A-EHLMPRST][\dLMNP-V]{2}[A-Z][\dLMNP-V]{3}[A-Z]", "fiscale codice",
             "it.codicefiscale", r"[A-Z]{6}\d\d[A-EHLMPRST]\d\d[A-Z]\d{3}[A-Z]"),
    Identity("JP", r"\d{4}[- ]?\d{4}[- ]?\d{4}", "mynumber マイナンバー", "jp.in_"),
    Identity("KR", r"\d{6}-\d{7}", "rrn 주민등록번호", "kr.rrn", r"\d{6}-[1-8]\d{6}"),
    Identity("LT", _RUN11, "asmens kodas", "lt.asmens"),
    Identity("MX", r"[A-Z]{4}\d{6}[HM][A-Z]{5}[0-9A-Z]\d", "curp", "mx.curp", r"[A-Z]{4}\d{6}[HM][A-Z]{5}[0-9A-Z]\d"),
    Identity("MY", r"\d{6}-?\d\d-?\d{4}", "nric", "my.nric"),
    Identity("NL", r"\d{9}|\d{4}\.\d\d\.\d{3}", "bsn burgerservicenummer sofinummer persoonsnummer", "nl.bsn"),
    Identity("NO", r"\d{6} ?\d{5}", "fødselsnummer fodselsnummer personnummer", "no.fodselsnummer"),
    Identity("PK", r"\d{5}-?\d{7}-?\d", "cnic", "pk.cnic"),
    Identity("PL", _RUN11, "pesel", "pl.pesel"),
    Identity("PT", r"\d{3} ?\d{3} ?\d{3}", "nif contribuinte", "pt.nif"),
    Identity("RO", r"\d{13}", "cnp", "ro.cnp"),
    Identity("SE", r"(?:19|20)?\d{6}[-+]?\d{4}", "personnummer", "se.personnummer"),
    Identity("SI", r"\d{13}", "emšo emso", "si.emso"),
    Identity("TR", _RUN11, "kimlik tckn", "tr.tckimlik"),
    Identity("US", r"9\d\d-\d\d-\d{4}", "itin taxpayer", "us.itin"),
    Identity("ZA", r"\d{6} ?\d{4} ?\d{3}", "identity id", "za.idnr"),
    Identity("", r"[A-Z]{0,2}\d{6,9}", "passport passeport pasaporte"),
    Identity("", r"[A-Z]{0,2}\d{5,14}|\d{4}-\d\d-\d{4}|[A-Z]\d{3}-\d{4}-\d{4}",
             r"driv(?:er|ing)\W{0,3}s?\W{0,2}licen[cs]e führerschein(?:nummer)? permis\W{1,3}conduire"),
)  # fmt: skip


@dataclass(frozen=True)
class _Rule:
    form: re.Pattern[str]
    words: re.Pattern[str]
    alone: re.Pattern[str] | None
    check: str


@functools.cache
def _rules() -> tuple[re.Pattern[str], list[_Rule]]:
    """A pattern that every number fits one way or another, to turn most candidates away at once; and the rules."""
    rules = []
    for i in IDENTITIES:
        words = re.compile(rf"(?<!\w)(?:{'|'.join(i.words.split())})(?!\w)", re.IGNORECASE)
        # (?:...) around a form keeps its alternatives together under the end condition.
        alone = re.compile(f"(?:{i.alone}){_END}") if i.alone else None
        rules.append(_Rule(re.compile(f"(?:{i.form}){_END}"), words, alone, i.check))
    return re.compile("(?:" + "|".join(f"(?:{i.form})" for i in IDENTITIES) + ")" + _END), rules


@functools.cache
def _valid(module: str) -> Callable[[str], bool]:
    function: Callable[[str], bool] = importlib.import_module(f"stdnum.{module}").is_valid
    return function


def check(text: str, before: str, _after: str, _region: str | None) -> int:
    """Length of the identity number at the start of `text`; 0 = none."""
    any_form, rules = _rules()
    if text.startswith("0000") or not any_form.match(text):  # 0000: our substitutes
        return 0
    for rule in rules:
        match = rule.form.match(text)
        if match is None or not ((rule.alone is not None and rule.alone.match(text)) or rule.words.search(before)):
            continue
        if not rule.check or _valid(rule.check)(match.group()):
            return match.end()
    return 0
