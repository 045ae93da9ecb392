"""Option models of the readers and of every step: the part of this room that plans and schemas load.

Every threshold has its paper's default, and null turns the rule off.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from modelyard.corpus.dedup_options import DedupOptions
from modelyard.corpus.filter_options import (
    ClassifyOptions,
    DecontaminateOptions,
    GroupsOptions,
    ScrubOptions,
    ToxicityOptions,
)
from modelyard.recipe.schema import Bytes, Options

RuleSet = Literal["gopher", "c4", "fineweb"]


class HtmlOptions(Options):
    """How the text of an HTML page is taken out (resiliparse, Bevendorff et al. 2018)."""

    main_content: bool = Field(
        True, description="only the main content; false = also navigation, side bars, footers and the like"
    )
    links: bool = Field(False, description="write the targets of links behind their texts")
    alt_texts: bool = Field(False, description="write the alternative texts of images")
    list_bullets: bool = Field(True, description="write bullets and numbers of lists")
    comments: bool = Field(False, description="take sections of readers' comments for content")
    skip_elements: tuple[str, ...] = Field((), description="CSS selectors of elements to leave out")
    max_depth: int = Field(
        512, ge=16, description="pages whose elements nest deeper are quarantined; 512 as browsers cut off"
    )


class ReadOptions(Options):
    """How files become documents."""

    format: Literal["auto", "text", "jsonl", "parquet", "html", "warc"] = Field(
        "auto",
        description="file format; auto goes by suffix (.jsonl, .ndjson, .parquet, .html, .htm, .xhtml, .warc, .wet, "
        "each also .gz or .zst; anything else is text)",
    )
    html: HtmlOptions = Field(HtmlOptions(), description="how pages of HTML and WARC files become text")
    text: str = Field("text", min_length=1, description="field or column that holds the text (JSONL, Parquet)")
    prompt: str | None = Field(None, description="field or column kept as the column `prompt`; null = none")
    python: Literal["source", "docstrings"] = Field(
        "source", description="*.py files: the whole source, or one document a documented function or class"
    )
    min_docstring_chars: int = Field(
        24, ge=1, description="shorter docstrings are no documents, characters; own choice"
    )
    max_document_bytes: Bytes = Field(
        16_000_000, description="longer records are quarantined, bytes of UTF-8; own choice, bounds a worker's memory"
    )
    max_bad_records: int | None = Field(
        None,
        ge=0,
        description="fail the stage when more records than this are damaged; null = never; pages that are no "
        "documents (another type, an error status, no content) do not count",
    )


class NormalizeOptions(Options):
    """Unicode NFC, mojibake repair, control characters and white space."""

    unicode: Literal["NFC", "NFKC"] | None = Field("NFC", description="Unicode normal form (UAX 15); null = as it is")
    mojibake: bool = Field(True, description="repair text that was decoded with the wrong codec (ftfy)")
    control: bool = Field(True, description="remove control characters other than tab and newline")
    whitespace: Literal["lines", "collapse"] | None = Field(
        "lines",
        description="lines: \\n line ends, no trailing blanks, no blank head or tail; collapse: also runs of blanks "
        "inside a line; null = as it is",
    )
    max_blank_lines: int | None = Field(2, ge=0, description="longest run of blank lines kept; null = any")


_CODES = (
    "ace af am an ar ary arz as az ba bcl be bg bn br bs ca crh cs cy da de dz el en eo es et eu ext fa fi fo fr fuv "
    "fy ga gcf gcr gd gl gom grc gu gug guw ha hbo he hi hr ht hu hy id ig is it ja jv ka kab kik kk km kn ko ku ky la "
    "lb lg lij ln lo lt ltg lv mg mk ml mn mr ms mt my ne nl nn no nso oc om or pa pcm pl ps pt qu ro ru rw sa sdh se "
    "si sk sl sn so sq sr st sv sw ta te tg th tk tl tr tt ug uk ur uz uzs vec vi vo wa wuu xh yo yue zh zu zxx"
)
LANGUAGES = tuple(_CODES.split(" "))


class LanguageOptions(Options):
    """Language identification by the model that py3langid brings; nothing is downloaded."""

    languages: tuple[str, ...] | None = Field(
        None, description="ISO 639 codes of the languages to keep, such as [en, de]; null = any"
    )
    threshold: float = Field(
        0.65, ge=0, le=1, description="smallest score of the best language; 0.65 as FineWeb (arXiv:2406.17557)"
    )
    mode: Literal["drop", "annotate"] = Field(
        "drop", description="annotate adds the columns language and language_score and drops nothing"
    )
    bytes: int = Field(
        2048, ge=64, description="bytes of a longer document that are looked at, in four places; own choice"
    )

    @field_validator("languages")
    @classmethod
    def _known(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if unknown := [code for code in value or () if code not in LANGUAGES]:
            raise ValueError(f"{unknown[0]!r} is no language of the model; there are: {' '.join(LANGUAGES)}")
        return value


class GopherOptions(Options):
    """Gopher's quality and repetition rules (Rae et al. 2021, arXiv:2112.11446, section A1.1, table A1)."""

    min_words: int | None = Field(50, description="fewest words that are not all punctuation")
    max_words: int | None = Field(100_000, description="most words that are not all punctuation")
    min_mean_word_length: float | None = Field(3.0, description="smallest mean word length, characters")
    max_mean_word_length: float | None = Field(10.0, description="largest mean word length, characters")
    max_hash_ratio: float | None = Field(0.1, description="most # characters a word")
    max_ellipsis_ratio: float | None = Field(0.1, description="most ellipses a word")
    max_bullet_lines: float | None = Field(0.9, description="largest share of lines that start with a bullet")
    max_ellipsis_lines: float | None = Field(0.3, description="largest share of lines that end with an ellipsis")
    min_alphabetic_words: float | None = Field(0.8, description="smallest share of words with a letter")
    min_stop_words: int | None = Field(
        2, description="fewest distinct words of: the, be, to, of, and, that, have, with"
    )
    max_duplicate_paragraphs: float | None = Field(0.30, description="largest share of repeated paragraphs")
    max_duplicate_paragraph_chars: float | None = Field(0.20, description="largest share of characters in them")
    max_duplicate_lines: float | None = Field(0.30, description="largest share of repeated lines")
    max_duplicate_line_chars: float | None = Field(0.20, description="largest share of characters in them")
    max_top_2gram: float | None = Field(0.20, description="largest share of characters in the most frequent 2-gram")
    max_top_3gram: float | None = Field(0.18, description="largest share of characters in the most frequent 3-gram")
    max_top_4gram: float | None = Field(0.16, description="largest share of characters in the most frequent 4-gram")
    max_duplicate_5gram: float | None = Field(0.15, description="largest share of characters in repeated 5-grams")
    max_duplicate_6gram: float | None = Field(0.14, description="largest share of characters in repeated 6-grams")
    max_duplicate_7gram: float | None = Field(0.13, description="largest share of characters in repeated 7-grams")
    max_duplicate_8gram: float | None = Field(0.12, description="largest share of characters in repeated 8-grams")
    max_duplicate_9gram: float | None = Field(0.11, description="largest share of characters in repeated 9-grams")
    max_duplicate_10gram: float | None = Field(0.10, description="largest share of characters in repeated 10-grams")


class C4Options(Options):
    """C4's rules (Raffel et al. 2020, arXiv:1910.10683, section 2.2): lines first, then the page.

    The last two line rules are in the authors' code, not in the paper.
    """

    terminal_punctuation: bool = Field(True, description="a kept line ends in . ? ! or a quotation mark, not in ...")
    min_words_per_line: int | None = Field(3, description="fewest words of a kept line")
    javascript: bool = Field(True, description="lines that mention javascript are not kept")
    policy: bool = Field(True, description="lines that mention cookies, terms of use, privacy policy are not kept")
    max_word_length: int | None = Field(1000, description="lines with a longer word are not kept, characters")
    min_sentences: int | None = Field(5, description="fewest sentences in the kept lines")
    lorem_ipsum: bool = Field(True, description="drop pages with lorem ipsum")
    curly_bracket: bool = Field(True, description="drop pages with { (meant for prose; turn off for technical text)")
    remove_lines: bool = Field(True, description="cut the lines not kept out of the text; false = only count them")


class FineWebOptions(Options):
    """FineWeb's own rules (Penedo et al. 2024, arXiv:2406.17557, section 3.6)."""

    min_punctuated_lines: float | None = Field(0.12, description="smallest share of lines ending in punctuation")
    max_short_lines: float | None = Field(0.67, description="largest share of short lines")
    short_line: int = Field(30, ge=0, description="longest line that counts as short, characters")
    max_duplicate_line_chars: float | None = Field(0.01, description="largest share of characters in repeated lines")
    max_newlines_per_word: float | None = Field(0.3, description="most newlines a word")


class QualityOptions(Options):
    """Heuristic rule sets, all judged on the text as it arrives, in one pass over its bytes."""

    rules: tuple[RuleSet, ...] = Field(("gopher", "c4", "fineweb"), description="rule sets, in the order they judge")
    mode: Literal["drop", "annotate"] = Field(
        "drop", description="annotate tags documents (columns quality_reason, quality) and drops nothing"
    )
    statistics: bool = Field(False, description="keep every statistic as a column stat_*")
    gopher: GopherOptions = Field(GopherOptions(), description="thresholds of the Gopher rules")
    c4: C4Options = Field(C4Options(), description="thresholds of the C4 rules")
    fineweb: FineWebOptions = Field(FineWebOptions(), description="thresholds of the FineWeb rules")

    @model_validator(mode="after")
    def _distinct(self) -> QualityOptions:
        if len(set(self.rules)) != len(self.rules):
            raise ValueError("a rule set is named twice")
        return self


class CardOptions(Options):
    """What the data card says about a corpus beyond what was counted."""

    title: str | None = Field(None, description="title of the data card; null = the stage's name")
    description: str | None = Field(None, description="what the corpus is and what it is for")
    source: str | None = Field(None, description="where the files came from, when and how they were collected")
    licence: str | None = Field(None, description="licence or terms of the documents, as text or SPDX identifier")


class StepOptions(Options):
    """One step: a mapping with a single key, the step's name (`{quality: {rules: [gopher]}}`)."""

    extract: HtmlOptions | None = Field(None, description="turn HTML in the text column into text")
    normalize: NormalizeOptions | None = Field(None, description="clean up characters and white space")
    language: LanguageOptions | None = Field(None, description="tell the language, and keep only some")
    quality: QualityOptions | None = Field(None, description="drop or tag by heuristic rules")
    dedup: DedupOptions | None = Field(None, description="remove equal or similar documents, or repeated paragraphs")
    decontaminate: DecontaminateOptions | None = Field(None, description="remove text of evaluation sets")
    classify: ClassifyOptions | None = Field(None, description="keep what a classifier likes")
    groups: GroupsOptions | None = Field(None, description="tag groups of people, to see what later steps drop of each")
    toxicity: ToxicityOptions | None = Field(None, description="drop or tag toxic text")
    scrub: ScrubOptions | None = Field(None, description="remove personal data and secrets")

    @model_validator(mode="after")
    def _one(self) -> StepOptions:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            names = ", ".join(type(self).model_fields)
            raise ValueError(f"a step is a mapping with one key of: {names}; this one has {given or 'none'}")
        return self

    @property
    def name(self) -> str:
        """The step's name, as it stands in reasons and reports."""
        return next(name for name in type(self).model_fields if getattr(self, name) is not None)

    @property
    def options(self) -> Options:
        """The step's own options."""
        value: Options = getattr(self, self.name)
        return value

    @property
    def inputs(self) -> tuple[str, ...]:
        """Stage inputs besides the documents that the step reads."""
        return getattr(self.options, "inputs", ())
