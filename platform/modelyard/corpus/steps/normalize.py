"""Unicode and white space: only documents that a byte scan finds in need are touched."""

from __future__ import annotations

from typing import Any

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
        if self.options.mojibake:
            text = self._repair(text, np.flatnonzero(bits & kernels.MOJIBAKE))
        if self.options.unicode is not None:
            text = self._unicode(text, np.flatnonzero(bits & kernels.NON_ASCII))
        if self.options.mojibake or self.options.unicode is not None:
            # Repaired text may hold white space that the first look did not see.
            bits = kernels.inspect(*buffers(text))
        rows = np.flatnonzero(bits & kernels.UNCLEAN)
        switches = kernels.CONTROL if self.options.control else 0
        switches |= {None: 0, "lines": kernels.LINES, "collapse": kernels.COLLAPSE}[self.options.whitespace]
        if not len(rows) or not switches:
            return text
        most = self.options.max_blank_lines
        cleaned = strings(*kernels.clean(*buffers(text), rows, switches, -1 if most is None else most + 1))
        return self._put(text, rows, cleaned, "whitespace")

    def _repair(self, text: Any, rows: npt.NDArray[np.int64]) -> Any:
        if not len(rows):
            return text
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

    def _unicode(self, text: Any, rows: npt.NDArray[np.int64]) -> Any:
        if not len(rows):
            return text
        part = text.take(pa.array(rows))
        return self._put(text, rows, pc.utf8_normalize(part, form=self.options.unicode), "unicode")

    def _put(self, text: Any, rows: npt.NDArray[np.int64], new: Any, count: str) -> Any:
        """The column with `new` at `rows` where it differs."""
        part = text.take(pa.array(rows))
        differs = np.asarray(pc.not_equal(part, new).to_numpy(zero_copy_only=False), bool)
        self.counts[count] += int(differs.sum())
        if not differs.any():
            return text
        array = text.combine_chunks() if isinstance(text, pa.ChunkedArray) else text
        mask = np.zeros(len(array), bool)
        mask[rows[differs]] = True
        new = new.combine_chunks() if isinstance(new, pa.ChunkedArray) else new
        return pc.replace_with_mask(array, pa.array(mask), new.filter(pa.array(differs)).cast(array.type))
