"""Keeps documents by the score of a trained linear classifier."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from modelyard.corpus.classifier import load, uniform
from modelyard.corpus.filter_options import ClassifyOptions
from modelyard.corpus.step import Step, put, reasons_from, with_reason


class Classify(Step):
    """Scores documents and keeps those above a threshold, or a Pareto sample. See `ClassifyOptions`.

    Raises:
        DataError: the files are no classifier.
    """

    name = "classify"

    def __init__(self, options: ClassifyOptions, uris: tuple[str, ...]) -> None:
        super().__init__()
        self.options = options
        self._model = load(uris)

    @property
    def adds(self) -> tuple[str, ...]:
        """The score, float32 from 0 to 1."""
        return (self.options.column,)

    def __call__(self, table: Any) -> Any:
        score = self._model(table["text"])
        table = put(table, self.options.column, pa.array(score, pa.float32()))
        if self.options.mode == "annotate":
            return with_reason(table, pa.nulls(table.num_rows, pa.string()))
        low = score < self.options.threshold
        if self.options.mode == "pareto":
            # Lomax draw by inversion: (1 - u) ** (-1 / alpha) - 1, as numpy.random.pareto.
            draw = uniform(table["id"], f"pareto {self.options.seed}")
            low = (1 - draw) ** (-1 / self.options.alpha) - 1 <= 1 - score
        return with_reason(table, reasons_from([("classify_low_score", np.asarray(low, bool))], table.num_rows))
