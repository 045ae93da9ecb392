"""Names of people, organisations and places by a spaCy model, loaded only when a recipe asks for it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from modelyard.corpus.entities import Span
from modelyard.corpus.filter_options import NerOptions
from modelyard.errors import RecipeError

_LABELS = {
    "PERSON": "person", "PER": "person", "ORG": "organisation", "GPE": "location", "LOC": "location",
    "FAC": "location",
}  # fmt: skip
_PIECE = 50_000  # characters that the model sees at once; it takes about 1 GB for 100,000


def check(options: NerOptions) -> None:
    """Whether spaCy and the model are there, without loading them.

    Raises:
        RecipeError: spaCy is not installed, or the model is neither a package nor a folder.
    """
    if importlib.util.find_spec("spacy") is None:
        raise RecipeError("scrub.ner needs spaCy", place="scrub.ner", mend='pip install "modelyard[ner]"')
    if not (Path(options.model) / "meta.json").exists() and importlib.util.find_spec(options.model) is None:
        raise RecipeError(
            f"there is no spaCy model {options.model!r}",
            place="scrub.ner.model",
            mend="install the model's package, or give the folder that holds its meta.json",
        )


@lru_cache(2)
def _load(model: str) -> Any:
    import spacy

    # Only what entity recognition needs: parsing alone would double the time.
    return spacy.load(model, exclude=["parser", "lemmatizer", "attribute_ruler", "senter", "tagger"])


class Names:
    """Finds names. One instance a worker; the model is shared."""

    def __init__(self, options: NerOptions) -> None:
        check(options)
        self._types = frozenset(options.actions)
        self._model = options.model

    def find(self, text: Any) -> dict[int, list[Span]]:
        """Row -> spans of names in a string column, in order, with places in UTF-8 bytes."""
        model = _load(self._model)
        found: dict[int, list[Span]] = {}
        for doc, (row, offset) in model.pipe(_pieces(text), as_tuples=True, batch_size=32):
            for entity in doc.ents:
                kind = _LABELS.get(entity.label_)
                # What holds no letter, or marks of our placeholders, is no name.
                plausible = any(c.isalpha() for c in entity.text) and not set("[]@\n") & set(entity.text)
                if kind in self._types and plausible:
                    start = offset + len(doc.text[: entity.start_char].encode())
                    span = Span(row, start, start + len(entity.text.encode()), kind, entity.text)
                    found.setdefault(row, []).append(span)
        return found


def _pieces(text: Any) -> Iterator[tuple[str, tuple[int, int]]]:
    """(text, (row, byte offset)) of every row, long ones cut at line ends where they have any."""
    for row, value in enumerate(text.to_pylist()):
        rest, offset = value or "", 0
        while rest:
            cut = len(rest) if len(rest) <= _PIECE else (rest.rfind("\n", 0, _PIECE) + 1 or _PIECE)
            yield rest[:cut], (row, offset)
            offset += len(rest[:cut].encode())
            rest = rest[cut:]
