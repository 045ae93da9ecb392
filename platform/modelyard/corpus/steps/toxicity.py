"""Toxic text by lists of phrases in each language, and by a classifier."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pyarrow as pa

from modelyard.corpus.arrow import buffers
from modelyard.corpus.classifier import load
from modelyard.corpus.filter_options import ToxicityOptions
from modelyard.corpus.items import base, read_text
from modelyard.corpus.step import Step, put, reasons_from, with_reason
from modelyard.errors import DataError

_LANGUAGE = "language"  # column of the language step; a list applies to documents of its own language


@functools.lru_cache(4)
def _lists(uris: tuple[str, ...]) -> tuple[Any, list[str]]:
    """(phrases, language of each). The language is the file's name up to the first point."""
    from modelyard.corpus.kernels.phrases import Phrases

    pairs = [
        (base(uri).split(".", 1)[0].lower(), line.strip())
        for uri in uris
        for line in read_text(uri).splitlines()
        if line.strip() and not line.startswith("#")
    ]
    if not pairs:
        raise DataError("the word lists are empty", place=", ".join(uris), mend="one word or phrase a line")
    data, offsets = buffers(pa.array([phrase for _, phrase in pairs], pa.large_string()))
    # As long as the longest phrase, so that each phrase counts whole.
    most = max(len(phrase) for _, phrase in pairs) + 1
    return Phrases.build(data, offsets, most, 1), [language for language, _ in pairs]


class Toxicity(Step):
    """Drops or tags toxic documents. See `ToxicityOptions`.

    Raises:
        DataError: the lists are empty or unreadable, or the model is none.
    """

    name = "toxicity"

    def __init__(self, options: ToxicityOptions, words: tuple[str, ...], model: tuple[str, ...]) -> None:
        super().__init__()
        self.options = options
        self._phrases: Any = None
        self._languages: list[str] = []
        if words:
            self._phrases, self._languages = _lists(words)
        self._model = load(model) if model else None

    @property
    def adds(self) -> tuple[str, ...]:
        """`toxic_words` (int32, listed phrases in the text) with lists, `toxicity` (float32) with a model."""
        return (*(("toxic_words",) if self._phrases else ()), *(("toxicity",) if self._model else ()))

    def __call__(self, table: Any) -> Any:
        rows, masks = table.num_rows, []
        if self._phrases is not None:
            hits, words = self._hits(table)
            table = put(table, "toxic_words", pa.array(hits.astype(np.int32)))
            enough = hits >= np.maximum(self.options.min_share * words, self.options.min_hits)
            masks.append(("toxic_words", enough))
        if self._model is not None:
            score = self._model(table["text"])
            table = put(table, "toxicity", pa.array(score, pa.float32()))
            masks.append(("toxic_classifier", np.asarray(score >= self.options.threshold, bool)))
        for name, mask in masks:
            self.counts[name] += int(mask.sum())
        annotate = self.options.mode == "annotate"
        return with_reason(table, pa.nulls(rows, pa.string()) if annotate else reasons_from(masks, rows))

    def _hits(self, table: Any) -> tuple[Any, Any]:
        """(listed phrases, words) of each document; a document of known language meets the lists of that language."""
        hits, words = self._phrases.find(*buffers(table["text"]))
        if _LANGUAGE in table.column_names and len(hits):
            languages = table[_LANGUAGE].to_pylist()
            known = set(self._languages)
            fits = [languages[d] not in known or languages[d] == self._languages[i] for d, i in hits[:, :2].tolist()]
            hits = hits[np.array(fits, bool)]
        places = np.unique(hits[:, [0, 2, 3]], axis=0)
        return np.bincount(places[:, 0], minlength=table.num_rows), words
