"""Personal data and secrets: found by form, confirmed by checksum, then redacted, masked, replaced or dropped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from modelyard.corpus.arrow import replace
from modelyard.corpus.entities import Span
from modelyard.corpus.filter_options import ScrubOptions
from modelyard.corpus.pseudonym import Pseudonyms, load_key
from modelyard.corpus.step import Step, with_reason

_PASSES = 3  # a replacement can join its neighbours into a new match; a second pass has always found none
Found = dict[int, list[Span]]


class Scrub(Step):
    """Acts on every structured entity, and on names where a model is given. See `ScrubOptions`.

    Raises:
        RecipeError: an action is `pseudonymize` and its key is missing, or the model of names is.
    """

    name = "scrub"

    def __init__(self, options: ScrubOptions) -> None:
        super().__init__()
        self.options = options
        self._types = frozenset(options.actions)
        self._actions = options.actions | (options.ner.actions if options.ner is not None else {})
        self._pseudonyms = Pseudonyms(load_key(options.key_file)) if options.pseudonymizes else None
        self._names: Any = None
        if options.ner is not None and options.ner.actions:
            from modelyard.corpus.names import Names

            self._names = Names(options.ner)

    @property
    def adds(self) -> tuple[str, ...]:
        """`entities`: int32, how many were found in the document."""
        return ("entities",)

    def __call__(self, table: Any) -> Any:
        counts = np.zeros(table.num_rows, np.int32)
        reasons: list[str | None] = [None] * table.num_rows
        for column in self._columns(table):
            index = table.column_names.index(column)
            rewritten = self.rewrite(table[column], counts, reasons, column)
            table = table.set_column(index, column, rewritten)
        if "entities" in table.column_names:
            table = table.drop_columns(["entities"])
        return with_reason(table.append_column("entities", pa.array(counts)), pa.array(reasons, pa.string()))

    def _columns(self, table: Any) -> list[str]:
        return [column for column in self.options.columns if column in table.column_names]

    def rewrite(
        self, text: Any, counts: Any = None, reasons: list[str | None] | None = None, column: str = "text"
    ) -> Any:
        """A string column with every entity acted on; adds to `counts` and sets `reasons` by row when given.

        `column` "meta" is JSON and stays so: a number becomes a string, and what would not parse any more `{}`.
        """
        counts = np.zeros(len(text), np.int32) if counts is None else counts
        reasons = [None] * len(text) if reasons is None else reasons
        rows: list[int] | None = None
        for turn in range(_PASSES):
            found = self._find(text, column, rows)
            if turn == 0 and self._names is not None and column in ("text", "prompt"):
                found = _merged(found, self._names.find(text))
            if not found:
                break
            text = self._rewrite(text, found, counts, reasons, column == "meta")
            rows = sorted(found)  # only what was changed can hold something new
        return text

    def _find(self, text: Any, column: str, rows: list[int] | None = None) -> Found:
        from modelyard.corpus.entities import find

        text = text if rows is None else text.take(pa.array(rows, pa.int64()))
        found = find(_without_escapes(text) if column == "meta" else text, self._types, self.options.region)
        return found if rows is None else {rows[place]: spans for place, spans in found.items()}

    def _rewrite(self, text: Any, found: Found, counts: Any, reasons: list[str | None], is_json: bool) -> Any:
        rows, texts = [], []
        for row, spans in sorted(found.items()):
            counts[row] += len(spans)
            if dropping := [s.type for s in spans if self._actions[s.type] == "drop"]:
                reasons[row] = reasons[row] or f"scrub_{dropping[0]}"
                self.counts[f"{dropping[0]}/drop"] += 1
            source = text[row].as_py().encode()
            parts = list(self._parts(source, spans, is_json))
            rows.append(row)
            texts.append(b"".join(parts).decode())
            if is_json and not _parses(texts[-1]):
                texts[-1] = "{}"
                self.counts["meta/cleared"] += 1
        return replace(text, np.array(rows, np.int64), texts)

    def _parts(self, source: bytes, spans: list[Span], is_json: bool) -> Iterator[bytes]:
        at, quotes = 0, 0
        for span in spans:
            between = source[at : span.start]
            yield between
            new = self._substitute(span.type, span.text).encode()
            if is_json:
                # An even number of quotation marks so far: a bare number, not the inside of a string.
                quotes += between.replace(b"\\\\", b"").replace(b'\\"', b"").count(b'"')
                new = b'"' + new + b'"' if quotes % 2 == 0 else new
            yield new
            at = span.end
            if self._actions[span.type] != "drop":
                self.counts[f"{span.type}/{self._actions[span.type]}"] += 1
        yield source[at:]

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
        for column in self._columns(table):
            for row, spans in self._find(table[column], column).items():
                left += [(table["id"][row].as_py(), span.type) for span in spans]
        return left


def _without_escapes(text: Any) -> Any:
    """JSON texts with every escape as blanks of the same length, so that no letter of one joins a word."""
    wide = pc.replace_substring_regex(text, r"\\u[0-9a-fA-F]{4}", "      ")
    return pc.replace_substring_regex(wide, r"\\.", "  ")


def _parses(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _merged(structured: Found, names: Found) -> Found:
    """All spans in order; a name that overlaps something structured gives way."""
    result = dict(structured)
    for row, spans in names.items():
        taken = structured.get(row, [])
        free = [s for s in spans if not any(s.start < t.end and t.start < s.end for t in taken)]
        if free:
            result[row] = sorted([*taken, *free], key=lambda s: s.start)
    return result
