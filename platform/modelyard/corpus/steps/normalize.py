"""Unicode and white space: only documents that a byte scan finds in need are touched."""

from __future__ import annotations

import unicodedata
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from modelyard.corpus.arrow import buffers, replace, strings
from modelyard.corpus.options import NormalizeOptions
from modelyard.corpus.step import Step, reasons_from, with_reason


class Normalize(Step):
    """Repairs mojibake, brings text to a normal form, cleans control characters and white space.

    A document that has no text left is removed as `empty`. See `NormalizeOptions`.
    """

    name = "normalize"

    def __init__(self, options: NormalizeOptions) -> None:
        super().__init__()
        self.options = options

    def __call__(self, table: Any) -> Any:
        for column in ("text", "prompt"):
            if column in table.column_names:
                index = table.column_names.index(column)
                table = table.set_column(index, column, self._normalize(table[column]))
        empty = np.asarray(pc.equal(pc.binary_length(table["text"]), 0).to_numpy(zero_copy_only=False), bool)
        return with_reason(table, reasons_from([("empty", empty)], table.num_rows))

    def _normalize(self, text: Any) -> Any:
        from modelyard.corpus.kernels import normalize as kernels

        bits = kernels.inspect(*buffers(text))
        if self.options.mojibake and (rows := np.flatnonzero(bits & kernels.MOJIBAKE)).size:
            text = self._repair(text, rows)
            # Repaired text may hold white space that the first look did not see.
            bits = kernels.inspect(*buffers(text))
        text = self._clean(text, np.flatnonzero(bits & kernels.UNCLEAN))
        if self.options.unicode is None:
            return text
        # Last, for a removed control character may bring a letter and its accent together. Only NFC has a
        # quick check by bytes; NFKC may change any character that is not ASCII.
        bit = kernels.FORM if self.options.unicode == "NFC" else kernels.NON_ASCII
        return self._unicode(text, self.options.unicode, np.flatnonzero(bits & bit))

    def _clean(self, text: Any, rows: npt.NDArray[np.int64]) -> Any:
        from modelyard.corpus.kernels import normalize as kernels

        switches = kernels.CONTROL if self.options.control else 0
        switches |= {None: 0, "lines": kernels.LINES, "collapse": kernels.COLLAPSE}[self.options.whitespace]
        if not len(rows) or not switches:
            return text
        most = self.options.max_blank_lines
        cleaned = strings(*kernels.clean(*buffers(text), rows, switches, -1 if most is None else most + 1))
        return self._put(text, rows, cleaned, "whitespace")

    def _repair(self, text: Any, rows: npt.NDArray[np.int64]) -> Any:
        import ftfy
        from ftfy.badness import is_bad

        # Only encodings are repaired here: what ftfy would do to quotes, ligatures and widths is taste.
        config = ftfy.TextFixerConfig(
            unescape_html=False, remove_terminal_escapes=False, fix_latin_ligatures=False, fix_character_width=False,
            uncurl_quotes=False, fix_line_breaks=False, remove_control_chars=False, normalization=None,
            max_decode_length=1_000_000,
        )  # fmt: skip
        changed, fixed = [], []
        for row in rows.tolist():
            before = text[row].as_py()
            if is_bad(before) and (after := ftfy.fix_text(before, config)) != before:
                changed.append(row)
                fixed.append(after)
        self.counts["mojibake"] += len(changed)
        return replace(text, np.array(changed, np.int64), fixed)

    def _unicode(self, text: Any, form: Literal["NFC", "NFKC"], rows: npt.NDArray[np.int64]) -> Any:
        # Not pyarrow's utf8_normalize: in version 25 it decomposes whatever form is asked for.
        changed, texts = [], []
        for row in rows.tolist():
            before = text[row].as_py()
            if not unicodedata.is_normalized(form, before):
                changed.append(row)
                texts.append(unicodedata.normalize(form, before))
        self.counts["unicode"] += len(changed)
        return replace(text, np.array(changed, np.int64), texts)

    def _put(self, text: Any, rows: npt.NDArray[np.int64], new: Any, count: str) -> Any:
        """The column with `new` at `rows`; counts the rows that differ."""
        array = text.combine_chunks() if isinstance(text, pa.ChunkedArray) else text
        self.counts[count] += int(pc.sum(pc.not_equal(array.take(pa.array(rows)), new)).as_py() or 0)
        mask = np.zeros(len(array), bool)
        mask[rows] = True
        return pc.replace_with_mask(array, pa.array(mask), new.cast(array.type))
