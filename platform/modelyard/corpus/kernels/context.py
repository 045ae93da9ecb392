"""Words near a candidate that tell what it is: birth dates, coordinates, telephone and identity numbers.

A number alone is rarely personal data; `born`, `latitude` or `passport` before it make it so. All telling
words of all languages lie in one hashed table from word to bits, so one walk over the bytes before a
candidate answers for every kind.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from modelyard.corpus.kernels import kernel
from modelyard.corpus.kernels.forms import ALPHA, UPPER
from modelyard.corpus.kernels.text import PRIME, SEED

IDENTITY, BIRTH, GEO, CALL, AXIS, SUFFIX, LEAD, LINK = 1, 2, 4, 8, 16, 32, 64, 128
REACH = 48  # bytes before a candidate in which a telling word counts

WORDS: dict[int, str] = {
    # Words of `corpus.identities` (a test holds the two together).
    IDENTITY: "aadhaar ahv amka asmens avs aadhar bsn burgerservicenummer bürgernummer cédula cedula ci cnic cnp cpf "
    "codice αμκα id führerscheinnummer cpr curp dni driver driving ausweis egn егн emso emšo extranjero "
    "fiscal fiscale fødselsnummer fodselsnummer "
    "führerschein henkilötunnus hetu identidad identidade identification identifikationsnummer identité identity "
    "idnr insee insurance insz isikukood itin kimlik kennitala kod kodas contribuinte licence license medical "
    "mynumber マイナンバー national nhs nhsnumber ni nie nif nik nino nir niss nn nric oib pan passeport passport "
    "pasaporte permis persoonsnummer personnummer pesel pin pps ppsn registre "
    "rijksregisternummer rodné rodne rrn rut resident 身份证 身份证号 身份证号码 주민등록번호 sécu sécurité securite "
    "sin sociale social sozialversicherungsnummer sofinummer steuer steuerid steueridentifikationsnummer "
    "steuernummer svnr taxpayer tckn tfn tin versicherungsnummer vsnr",
    BIRTH: "birth born dob birthday birthdate geboren geb geburtsdatum geburtstag né née naissance nacido nacida "
    "nacimiento nato nata nascita nascido nascida nascimento geboortedatum född født syntynyt syntymäaika urodzony "
    "urodzona urodzenia narozen narozena",
    GEO: "lat latitude lon lng long longitude gps coordinates coordinate coords geo geolocation location located "
    "position breitengrad längengrad koordinaten coordonnées coordenadas coordinate",
    CALL: "phone telephone tel telefon telefono teléfono telefone téléphone portable mobil mobile móvil handy cell "
    "cellphone fax sms whatsapp dial hotline contact reach call calling desk puhelin office",
    AXIS: "lat latitude lon lng long longitude",
    SUFFIX: "street st avenue ave road rd boulevard blvd lane ln drive dr highway hwy parkway pkwy terrace crescent "
    "court ct way place pl square sq circle cir trail trl close grove alley row gardens",
    LEAD: "rue avenue boulevard chemin impasse quai allée place via viale piazza piazzetta corso vicolo calle avenida "
    "plaza paseo carrer rua travessa largo ulica ul ulitsa ulice calea strada bulevardul trg",
    LINK: "de la le les du des del della di da do dos das of the van der den het und y e el lo dei degli delle",
}


def _hash(word: str) -> int:
    value = int(SEED)
    for byte in "".join(c.lower() if c.isascii() else c for c in word).encode():
        value = ((value ^ byte) * int(PRIME)) & (2**64 - 1)
    return value


def _table() -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint8]]:
    keys, bits = np.zeros(2048, np.uint64), np.zeros(2048, np.uint8)
    for bit, words in WORDS.items():
        for word in set(words.split()):
            value = _hash(word)
            place = value & 2047
            while keys[place] not in (0, value):
                place = (place + 1) & 2047
            keys[place] = value
            bits[place] |= bit
    return keys, bits


KEYS, BITS = _table()
LONGEST = max(len(word.encode()) for words in WORDS.values() for word in words.split())
"""Bytes of the longest telling word."""


@kernel
def letter(byte: Any, forms: Any) -> Any:
    """Whether a byte is an ASCII letter or part of a character beyond ASCII."""
    return forms[byte] & ALPHA or byte >= 0x80


@kernel
def word_bits(data: Any, start: Any, end: Any, forms: Any) -> Any:
    """Bits of the word data[start:end], upper and lower case ASCII alike; 0 = no telling word."""
    if end - start > LONGEST:
        return np.int64(0)
    h = SEED
    for i in range(start, end):
        byte = data[i]
        h = (h ^ np.uint64(byte | 0x20 if forms[byte] & UPPER else byte)) * PRIME
    place = np.int64(h & np.uint64(2047))
    while KEYS[place] != 0:
        if KEYS[place] == h:
            return np.int64(BITS[place])
        place = (place + 1) & 2047
    return np.int64(0)


@kernel
def before(data: Any, i: Any, start: Any, forms: Any) -> Any:
    """Bits of all words that end in the REACH bytes before i."""
    low, found, k = max(start, i - REACH), np.int64(0), i
    while k > low:
        while k > low and not letter(data[k - 1], forms):
            k -= 1
        end = k
        while k > start and letter(data[k - 1], forms) and end - k < 40:
            k -= 1
        if end > k:
            found |= word_bits(data, k, end, forms)
    return found


@kernel
def adjacent(data: Any, i: Any, start: Any, forms: Any) -> Any:
    """Bits of the word just before i, behind at most 4 bytes of blanks and marks."""
    end = i
    while end > start and i - end < 4 and not letter(data[end - 1], forms) and data[end - 1] > 0x1F:
        end -= 1
    k = end
    while k > start and letter(data[k - 1], forms) and end - k < 40:
        k -= 1
    return word_bits(data, k, end, forms) if end > k else np.int64(0)


@kernel
def after(data: Any, i: Any, end: Any, forms: Any) -> Any:
    """Bits of the word just behind i, past at most 3 bytes of blanks and marks."""
    k = i
    while k < end and k - i < 3 and not letter(data[k], forms) and data[k] > 0x1F:
        k += 1
    last = k
    while last < end and letter(data[last], forms) and last - k < 40:
        last += 1
    return word_bits(data, k, last, forms) if last > k else np.int64(0)
