"""Which language a document is in: py3langid's model over all documents of a table in one pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from modelyard.corpus import language_model
from modelyard.corpus.arrow import buffers, replace
from modelyard.corpus.options import LanguageOptions
from modelyard.corpus.step import Step, with_reason


class Language(Step):
    """Adds the columns `language` and `language_score`; in drop mode removes what is not wanted.

    Reasons: `language_uncertain` below the threshold, else `language_<code>` for a language that is not
    among the allowed ones. See `LanguageOptions`.

    The model is the naive Bayes over byte n-grams of langid.py (Lui and Baldwin 2012) as py3langid trained it
    anew. On 10 to 50 pieces of the Universal Declaration of Human Rights in each of 90 languages it names
    94.7 % of 40-character and 96.2 % of 1000-character pieces rightly (fastText's lid.176.ftz: 73 % and 87 %).
    """

    name = "language"

    def __init__(self, options: LanguageOptions) -> None:
        super().__init__()
        self.options = options

    @property
    def adds(self) -> tuple[str, ...]:
        """`language` (ISO 639 code, `und` where nothing was recognised) and `language_score` (float32, 0 to 1)."""
        return ("language", "language_score")

    def __call__(self, table: Any) -> Any:
        codes, score = self.identify(table["text"])
        table = table.drop_columns([name for name in self.adds if name in table.column_names])
        table = table.append_column("language", codes).append_column("language_score", score)
        for item in pc.value_counts(codes).to_pylist():
            self.counts[f"{item['values']}/documents"] += item["counts"]
        if self.options.mode == "annotate":
            return table
        return with_reason(table, self._reasons(codes, score))

    def identify(self, text: Any) -> tuple[Any, Any]:
        """(codes, scores) of a string column."""
        from modelyard.corpus.kernels import language as kernels

        # Trained on running text: words in capitals alone look like another language.
        capitals = np.flatnonzero(pc.utf8_is_upper(text).to_numpy())
        text = replace(text, capitals, pc.utf8_lower(text.take(pa.array(capitals))).to_pylist())
        model = language_model.load()
        raw = kernels.scores(
            *buffers(text), self.options.bytes, model.moves, model.rows, model.outputs, model.table, model.prior
        )
        chances, names = model.merged(raw)
        best, score = chances.argmax(axis=1), chances.max(axis=1, initial=0)
        codes = pa.array(names).take(pa.array(best))
        seen = pa.array(raw.any(axis=1))
        return pc.if_else(seen, codes, "und"), pc.if_else(seen, pa.array(score), pa.scalar(0, pa.float32()))

    def _reasons(self, codes: Any, score: Any) -> Any:
        uncertain = pc.less(score, pa.scalar(self.options.threshold, pa.float32()))
        foreign: Any = pa.nulls(len(codes), pa.string())
        if self.options.languages is not None:
            allowed = pc.is_in(codes, pa.array(self.options.languages))
            foreign = pc.if_else(allowed, foreign, pc.binary_join_element_wise("language", codes, "_"))
        return pc.if_else(uncertain, "language_uncertain", foreign)
