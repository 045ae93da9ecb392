"""Option models of the steps that judge what a text says: privacy, decontamination, classifiers, toxicity."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from modelyard.recipe.schema import Options

Action = Literal["redact", "mask", "pseudonymize", "drop"]
Column = Literal["text", "prompt", "meta", "source"]

ENTITIES = (
    "email", "phone", "ip", "key", "url_credentials", "card", "iban", "ssn", "mac", "national_id", "birth_date",
    "coordinates", "address",
)  # fmt: skip
NAMES = ("person", "organisation", "location")


class NerOptions(Options):
    """Names by a spaCy model (the extra `ner`): slow, about 0.02 MB a CPU second, and never complete."""

    model: str = Field(
        "en_core_web_sm",
        min_length=1,
        description="an installed spaCy model by name, or a folder; only its name enters the fingerprint",
    )
    person: Action | None = Field("redact", description="names of people")
    organisation: Action | None = Field(None, description="names of companies, agencies, institutions")
    location: Action | None = Field(None, description="countries, cities, regions and buildings")

    @property
    def actions(self) -> dict[str, Action]:
        """Entity type -> action, of the types that are on."""
        return {name: value for name in NAMES if (value := getattr(self, name)) is not None}


class ScrubOptions(Options):
    """Structured personal data and secrets: what to do with each kind; null leaves it alone.

    `redact` writes a typed placeholder, `mask` stars of the same length, `pseudonymize` a substitute
    that is the same for the same value everywhere (HMAC-SHA256 under your key), `drop` drops the document.
    """

    email: Action | None = Field("redact", description="e-mail addresses")
    phone: Action | None = Field("redact", description="telephone numbers (validated by phonenumbers, or by words)")
    ip: Action | None = Field("redact", description="public IPv4 and IPv6 addresses")
    key: Action | None = Field("redact", description="API keys, tokens, private keys and assigned secrets")
    url_credentials: Action | None = Field("redact", description="user:password in URLs")
    card: Action | None = Field("redact", description="payment card numbers (issuer prefix and Luhn)")
    iban: Action | None = Field("redact", description="bank accounts (country length and mod 97)")
    ssn: Action | None = Field("redact", description="US social security numbers (valid area and group)")
    mac: Action | None = Field("redact", description="MAC addresses")
    national_id: Action | None = Field(
        "redact",
        description="identity, tax, health, licence numbers of 36 countries (check digits, words nearby)",
    )
    birth_date: Action | None = Field("redact", description="full dates behind a word of birth")
    coordinates: Action | None = Field("redact", description="latitude and longitude with three decimals or in degrees")
    address: Action | None = Field("redact", description="street with house number, and unit, town and code behind it")
    ner: NerOptions | None = Field(None, description="names of people, organisations and places by a model; null = off")
    columns: tuple[Column, ...] = Field(
        ("text", "prompt"), min_length=1, description="columns to scrub, where they exist; meta keeps valid JSON"
    )
    region: str | None = Field(
        "US", min_length=2, max_length=2, description="country of phone numbers without +; null = only with +"
    )
    key_file: str | None = Field(
        None, description="file with the pseudonym key; null = environment variable MODELYARD_PSEUDONYM_KEY"
    )
    leak_check: bool = Field(True, description="scan the finished output again and fail when anything is left")

    @property
    def actions(self) -> dict[str, Action]:
        """Structured entity type -> action, of the types that are on."""
        return {name: value for name in ENTITIES if (value := getattr(self, name)) is not None}

    @property
    def pseudonymizes(self) -> bool:
        """Whether any action needs the pseudonym key."""
        names = self.ner.actions if self.ner is not None else {}
        return "pseudonymize" in {*self.actions.values(), *names.values()}
