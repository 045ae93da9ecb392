"""Personal data and secrets: found by form, confirmed by checksum, then redacted, masked, replaced or dropped."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from modelyard.corpus.arrow import replace
from modelyard.corpus.options import ScrubOptions
from modelyard.corpus.pseudonym import Pseudonyms, load_key
from modelyard.corpus.step import Step, with_reason

_PASSES = 3  # a replacement can join its neighbours into a new match; a second pass has always found none


class Scrub(Step):
    """Acts on every structured entity. See `ScrubOptions`.

    Raises:
        RecipeError: an action is `pseudonymize` and its key is missing.
    """

    name = "scrub"

    def __init__(self, options: ScrubOptions) -> None:
        super().__init__()
        self.options = options
        self._actions = options.actions
        self._types = frozenset(self._actions)
        needs_key = "pseudonymize" in self._actions.values()
        self._pseudonyms = Pseudonyms(load_key(options.key_file)) if needs_key else None

    @property
    def adds(self) -> tuple[str, ...]:
        """`entities`: int32, how many were found in the document."""
        return ("entities",)

    def __call__(self, table: Any) -> Any:
        counts = np.zeros(table.num_rows, np.int32)
        reasons: list[str | None] = [None] * table.num_rows
        for column in ("text", "prompt"):
            if column in table.column_names:
                index = table.column_names.index(column)
                table = table.set_column(index, column, self.rewrite(table[column], counts, reasons))
        if "entities" in table.column_names:
            table = table.drop_columns(["entities"])
        return with_reason(table.append_column("entities", pa.array(counts)), pa.array(reasons, pa.string()))

    def rewrite(self, text: Any, counts: Any = None, reasons: list[str | None] | None = None) -> Any:
        """A string column with every entity acted on; adds to `counts` and sets `reasons` by row when given."""
        counts = np.zeros(len(text), np.int32) if counts is None else counts
        reasons = [None] * len(text) if reasons is None else reasons
        for _ in range(_PASSES):
            found = self._find(text)
            if not found:
                break
            text = self._rewrite(text, found, counts, reasons)
        return text

    def _find(self, text: Any) -> dict[int, Any]:
        from modelyard.corpus.entities import find

        return find(text, self._types, self.options.region)

    def _rewrite(self, text: Any, found: dict[int, Any], counts: Any, reasons: list[str | None]) -> Any:
        rows, texts = [], []
        for row, spans in sorted(found.items()):
            counts[row] += len(spans)
            if dropping := [s.type for s in spans if self._actions[s.type] == "drop"]:
                reasons[row] = reasons[row] or f"scrub_{dropping[0]}"
                self.counts[f"{dropping[0]}/drop"] += 1
            source, parts, at = text[row].as_py().encode(), [], 0
            for span in spans:
                parts += [source[at : span.start], self._substitute(span.type, span.text).encode()]
                at = span.end
                if self._actions[span.type] != "drop":
                    self.counts[f"{span.type}/{self._actions[span.type]}"] += 1
            rows.append(row)
            texts.append(b"".join([*parts, source[at:]]).decode())
        return replace(text, np.array(rows, np.int64), texts)

    def _substitute(self, kind: str, value: str) -> str:
        action = self._actions[kind]
        if action == "mask":
            return "*" * len(value)
        if action == "pseudonymize" and self._pseudonyms is not None:
            return self._pseudonyms(kind, value)
        return f"[{kind.upper()}]"

    def leaks(self, table: Any) -> list[tuple[str, str]]:
        """(document id, entity type) of everything structured that is left in a finished table."""
        left = []
        for column in ("text", "prompt"):
            if column in table.column_names:
                for row, spans in self._find(table[column]).items():
                    left += [(table["id"][row].as_py(), span.type) for span in spans]
        return left
