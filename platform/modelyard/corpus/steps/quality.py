"""Quality by heuristic rules: one kernel pass for all statistics, then one comparison a rule.

All rule sets judge the text as it arrives. C4 is the one that also changes it: in `drop` mode a
document that passes loses the lines C4 does not keep. The `quality` score is the mean distance of the
ratio statistics from their thresholds, 0 (at the limit) to 1 (far from it); it only ranks documents.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from modelyard.corpus.arrow import buffers, replace, strings
from modelyard.corpus.options import C4Options, FineWebOptions, GopherOptions, QualityOptions
from modelyard.corpus.step import Step, reasons_from, with_reason

Values = npt.NDArray[np.float64]
Masks = list[tuple[str, npt.NDArray[np.bool_]]]


def _ratio(part: Values, whole: Values) -> Values:
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)


class Verdicts:
    """Collects which documents break which rule, and how far each is from every threshold."""

    def __init__(self, rows: int) -> None:
        self.masks: Masks = []
        self._margin = np.zeros(rows)
        self._rules = 0

    def most(self, reason: str, value: Values, limit: float | None) -> None:
        """A rule broken by values above `limit`; null = off."""
        if limit is None:
            return
        self.masks.append((reason, value > limit))
        self._add((limit - value) / limit if limit else (value <= 0).astype(float))

    def least(self, reason: str, value: Values, limit: float | None) -> None:
        """A rule broken by values below `limit`; null = off."""
        if limit is None:
            return
        self.masks.append((reason, value < limit))
        if limit < 1:
            self._add((value - limit) / (1 - limit))

    def flag(self, reason: str, broken: npt.NDArray[np.bool_], on: bool = True) -> None:
        """A rule without a threshold."""
        if on:
            self.masks.append((reason, broken))

    def _add(self, margin: Values) -> None:
        self._margin += np.clip(margin, 0, 1)
        self._rules += 1

    def score(self) -> npt.NDArray[np.float32]:
        """Mean margin, 0 to 1."""
        return (self._margin / max(self._rules, 1)).astype(np.float32)


def gopher(s: dict[str, Values], o: GopherOptions, out: Verdicts) -> None:
    """Gopher quality and repetition, from the statistics of the kernel."""
    out.least("gopher_short_doc", s["real_words"], o.min_words)
    out.flag("gopher_long_doc", s["real_words"] > (o.max_words or 0), o.max_words is not None)
    mean = _ratio(s["real_word_chars"], s["real_words"])
    out.flag("gopher_short_words", mean < (o.min_mean_word_length or 0), o.min_mean_word_length is not None)
    out.flag("gopher_long_words", mean > (o.max_mean_word_length or 0), o.max_mean_word_length is not None)
    out.most("gopher_hashes", _ratio(s["hashes"], s["words"]), o.max_hash_ratio)
    out.most("gopher_ellipses", _ratio(s["ellipses"], s["words"]), o.max_ellipsis_ratio)
    out.most("gopher_bullet_lines", _ratio(s["bullet_lines"], s["lines"]), o.max_bullet_lines)
    out.most("gopher_ellipsis_lines", _ratio(s["ellipsis_lines"], s["lines"]), o.max_ellipsis_lines)
    out.least("gopher_alphabetic_words", _ratio(s["alphabetic_words"], s["words"]), o.min_alphabetic_words)
    out.least("gopher_stop_words", s["stop_words"], o.min_stop_words)
    _repetition(s, o, out)


def _repetition(s: dict[str, Values], o: GopherOptions, out: Verdicts) -> None:
    chars = s["chars"]
    out.most("gopher_dup_paragraphs", _ratio(s["duplicate_paragraphs"], s["paragraphs"]), o.max_duplicate_paragraphs)
    out.most(
        "gopher_dup_paragraph_chars", _ratio(s["duplicate_paragraph_chars"], chars), o.max_duplicate_paragraph_chars
    )
    out.most("gopher_dup_lines", _ratio(s["duplicate_lines"], s["repetition_lines"]), o.max_duplicate_lines)
    out.most("gopher_dup_line_chars", _ratio(s["duplicate_line_chars"], chars), o.max_duplicate_line_chars)
    for n in (2, 3, 4):
        out.most(f"gopher_top_{n}gram", _ratio(s[f"top_{n}gram"], chars), getattr(o, f"max_top_{n}gram"))
    for n in range(5, 11):
        limit = getattr(o, f"max_duplicate_{n}gram")
        out.most(f"gopher_dup_{n}gram", _ratio(s[f"duplicate_{n}gram"], chars), limit)


def c4(s: dict[str, Values], o: C4Options, out: Verdicts) -> None:
    """C4's page rules; the line rules already went into the statistics."""
    out.flag("c4_lorem_ipsum", s["c4_lorem"] > 0, o.lorem_ipsum)
    out.flag("c4_curly_bracket", s["c4_curly"] > 0, o.curly_bracket)
    out.flag("c4_few_sentences", s["c4_sentences"] < (o.min_sentences or 0), o.min_sentences is not None)


def fineweb(s: dict[str, Values], o: FineWebOptions, out: Verdicts) -> None:
    """FineWeb's rules."""
    out.flag("fineweb_empty", s["filled_lines"] == 0)
    out.least("fineweb_line_punctuation", _ratio(s["punctuated_lines"], s["filled_lines"]), o.min_punctuated_lines)
    out.most("fineweb_short_lines", _ratio(s["short_lines"], s["filled_lines"]), o.max_short_lines)
    ratio = _ratio(s["filled_duplicate_chars"], s["chars"] - s["newlines"])
    out.most("fineweb_dup_line_chars", ratio, o.max_duplicate_line_chars)
    out.most("fineweb_list", _ratio(s["newlines"], s["words"]), o.max_newlines_per_word)


def line_rules(options: QualityOptions) -> npt.NDArray[np.int64]:
    """The line rules as the kernels take them; rules of sets that are not named are off."""
    o = options.c4
    off = "c4" not in options.rules
    flags = (o.terminal_punctuation, o.min_words_per_line, o.javascript, o.policy, o.max_word_length, o.lorem_ipsum)
    terminal, words, javascript, policy, longest, lorem = flags
    if off:
        return np.array([options.fineweb.short_line, 0, -1, 0, 0, -1, 0, 0], np.int64)
    return np.array(
        [
            options.fineweb.short_line,
            int(terminal),
            -1 if words is None else words,
            int(javascript),
            int(policy),
            -1 if longest is None else longest,
            int(lorem),
            int(o.curly_bracket),
        ],
        np.int64,
    )


@functools.cache
def _tables() -> tuple[Any, Any]:
    from modelyard.corpus.kernels.quality import stop_hashes
    from modelyard.corpus.kernels.text import classes

    return classes(), stop_hashes()


class Quality(Step):
    """Drops or tags documents by the Gopher, C4 and FineWeb rules. See `QualityOptions`."""

    name = "quality"

    def __init__(self, options: QualityOptions) -> None:
        super().__init__()
        self.options = options
        self._rules = line_rules(options)

    @property
    def adds(self) -> tuple[str, ...]:
        """`quality` (float32 score), in annotate mode `quality_reason`, and `stat_*` when asked for."""
        from modelyard.corpus.kernels.quality import STATISTICS

        statistics = tuple(f"stat_{name}" for name in STATISTICS) if self.options.statistics else ()
        return ("quality", *(("quality_reason",) if self.options.mode == "annotate" else ()), *statistics)

    def __call__(self, table: Any) -> Any:
        statistics = self.statistics(table["text"])
        verdicts = self.judge(statistics, table.num_rows)
        reasons = reasons_from(verdicts.masks, table.num_rows)
        table = self._columns(table, statistics, verdicts)
        if self.options.mode == "annotate":
            return table.append_column("quality_reason", reasons)
        if "c4" in self.options.rules and self.options.c4.remove_lines:
            table = self._cut_lines(table, statistics, reasons)
        return with_reason(table, reasons)

    def statistics(self, text: Any) -> dict[str, Values]:
        """Every statistic of every document, by name."""
        from modelyard.corpus.kernels import quality

        data, offsets = buffers(text)
        counts = quality.statistics(data, offsets, *_tables(), self._rules)
        return {name: counts[:, i].astype(np.float64) for i, name in enumerate(quality.STATISTICS)}

    def judge(self, statistics: dict[str, Values], rows: int) -> Verdicts:
        """Which documents break which rule, in the order of `rules`."""
        out = Verdicts(rows)
        for name in self.options.rules:
            if name == "gopher":
                gopher(statistics, self.options.gopher, out)
            elif name == "c4":
                c4(statistics, self.options.c4, out)
            else:
                fineweb(statistics, self.options.fineweb, out)
        return out

    def _columns(self, table: Any, statistics: dict[str, Values], verdicts: Verdicts) -> Any:
        names = [f"stat_{name}" for name in statistics] if self.options.statistics else []
        table = table.drop_columns([n for n in ("quality", "quality_reason", *names) if n in table.column_names])
        table = table.append_column("quality", pa.array(verdicts.score()))
        for name in names:
            table = table.append_column(name, pa.array(statistics[name[5:]].astype(np.int64)))
        return table

    def _cut_lines(self, table: Any, statistics: dict[str, Values], reasons: Any) -> Any:
        from modelyard.corpus.kernels.lines import kept_lines

        cut = (statistics["c4_lines"] < statistics["lines"]) & reasons.is_null().to_numpy(zero_copy_only=False)
        rows = np.flatnonzero(cut)
        if not len(rows):
            return table
        data, offsets = buffers(table["text"])
        texts = strings(*kept_lines(data, offsets, rows, _tables()[0], self._rules))
        self.counts["lines_removed"] += int((statistics["lines"] - statistics["c4_lines"])[rows].sum())
        index = table.column_names.index("text")
        return table.set_column(index, "text", replace(table["text"], rows, texts.to_pylist()))
