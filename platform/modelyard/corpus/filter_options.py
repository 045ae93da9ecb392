"""Option models of the steps that judge what a text says: privacy, decontamination, classifiers, toxicity."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

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


class DecontaminateOptions(Options):
    """Evaluation text in documents, by n-grams of words in lower case without punctuation (GPT-3: 13)."""

    against: str = Field(min_length=1, description="name of the stage input that holds the evaluation files")
    fields: tuple[str, ...] = Field(
        (), description="fields (JSONL) or columns (Parquet) that hold the items' text; empty = every string in them"
    )
    ngram: int = Field(13, ge=2, le=100, description="words that must agree in a row (Brown et al. 2020, appendix C)")
    min_words: int = Field(
        8,
        ge=1,
        description="an item of fewer words than `ngram` counts whole if it has this many, else not at all",
    )
    min_hits: int = Field(1, ge=1, description="n-grams of a document that must agree before anything is done")
    mode: Literal["drop", "cut", "annotate"] = Field(
        "drop", description="drop the document, cut the n-grams out, or tag it (column contamination)"
    )
    context: int = Field(200, ge=0, description="cut: characters taken out on each side (GPT-3: 200)")
    min_chars: int = Field(
        200, ge=0, description="cut: characters that must be left, else the document goes (GPT-3: 200)"
    )

    @property
    def inputs(self) -> tuple[str, ...]:
        """Stage inputs that the step reads."""
        return (self.against,)


class ClassifyOptions(Options):
    """A linear classifier's score: keep what is above a threshold, or sample as GPT-3 did, or only tag."""

    model: str = Field(
        min_length=1, description="name of the stage input with the model: a classifier stage, or its files"
    )
    mode: Literal["threshold", "pareto", "annotate"] = Field(
        "threshold",
        description="threshold; pareto: keep if a Pareto(alpha) draw exceeds 1 - score (GPT-3); annotate: drop nothing",
    )
    threshold: float = Field(0.5, ge=0, le=1, description="smallest score kept: the calibrated probability of `good`")
    alpha: float = Field(9.0, gt=0, description="Pareto exponent (Brown et al. 2020, appendix A: 9)")
    seed: int = Field(0, description="of the draws, which are a hash of seed and document id")
    column: str = Field("classifier_score", pattern="^[a-z][a-z0-9_]*$", description="column for the score, 0 to 1")

    @property
    def inputs(self) -> tuple[str, ...]:
        """Stage inputs that the step reads."""
        return (self.model,)


class ToxicityOptions(Options):
    """Toxic text by word lists, by a classifier, or by either."""

    words: str | None = Field(
        None,
        description="name of the stage input with word lists: files named by language (en, de.txt), a phrase a line",
    )
    model: str | None = Field(
        None, description="name of the stage input with a classifier trained with toxic text as `good`"
    )
    min_hits: int = Field(1, ge=1, description="listed phrases in a document that make it toxic (C4: 1)")
    min_share: float = Field(0.0, ge=0, le=1, description="and their least share of its words")
    threshold: float = Field(0.9, ge=0, le=1, description="classifier scores from which a document is toxic")
    mode: Literal["drop", "annotate"] = Field(
        "drop", description="annotate tags (columns toxicity, toxic_words) and drops nothing"
    )

    @model_validator(mode="after")
    def _some(self) -> ToxicityOptions:
        if self.words is None and self.model is None:
            raise ValueError("toxicity needs `words`, `model`, or both")
        return self

    @property
    def inputs(self) -> tuple[str, ...]:
        """Stage inputs that the step reads."""
        return tuple(name for name in (self.words, self.model) if name is not None)


class GroupsOptions(Options):
    """Tags documents that name groups of people, so that the report shows how many of each later steps drop."""

    terms: dict[str, tuple[str, ...]] | None = Field(
        None, description="group -> words or phrases (English, plurals too); null = the built-in table"
    )
