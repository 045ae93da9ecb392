"""What a step is: options, the columns it reads and adds, and a pure function on an Arrow table.

A table of documents has the columns `id`, `text`, `source`, `meta` and what steps add. A step never
deletes: it returns one row for every row it was given, in the same order, with the column `reason`
set (not null) where a document should go. The caller splits kept from removed and writes the audit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from modelyard.corpus.filter_options import (
    ClassifyOptions,
    DecontaminateOptions,
    GroupsOptions,
    ScrubOptions,
    ToxicityOptions,
)
from modelyard.corpus.options import HtmlOptions, LanguageOptions, NormalizeOptions, QualityOptions, StepOptions

REASON = "reason"
DETAIL = "detail"  # of the reason, for the audit


class Step(ABC):
    """A row-wise step. One instance works through one unit of input and may count in `counts`."""

    name: ClassVar[str]
    reads: ClassVar[tuple[str, ...]] = ("text",)

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    @property
    def adds(self) -> tuple[str, ...]:
        """Columns in the result that were not in the input, besides `reason`."""
        return ()

    @abstractmethod
    def __call__(self, table: Any) -> Any:
        """Works on a table; the result has the same rows, and a `reason` where a document should go."""


def build(options: StepOptions, inputs: Mapping[str, tuple[str, ...]] | None = None) -> Step:
    """The step of its options; `inputs` are URIs of the files of stage inputs by name.

    Raises ValueError for `dedup`, which sees documents together.
    """
    own, files = options.options, inputs or {}
    if isinstance(own, (DecontaminateOptions, ClassifyOptions, ToxicityOptions, GroupsOptions)):
        return _with_files(own, files)
    from modelyard.corpus.steps.extract import Extract
    from modelyard.corpus.steps.language import Language
    from modelyard.corpus.steps.normalize import Normalize
    from modelyard.corpus.steps.quality import Quality
    from modelyard.corpus.steps.scrub import Scrub

    if isinstance(own, HtmlOptions):
        return Extract(own)
    if isinstance(own, LanguageOptions):
        return Language(own)
    if isinstance(own, NormalizeOptions):
        return Normalize(own)
    if isinstance(own, QualityOptions):
        return Quality(own)
    if isinstance(own, ScrubOptions):
        return Scrub(own)
    raise ValueError(f"{options.name} is not a row-wise step")


def _with_files(
    own: DecontaminateOptions | ClassifyOptions | ToxicityOptions | GroupsOptions, files: Mapping[str, tuple[str, ...]]
) -> Step:
    from modelyard.corpus.steps.classify import Classify
    from modelyard.corpus.steps.decontaminate import Decontaminate
    from modelyard.corpus.steps.groups import Groups
    from modelyard.corpus.steps.toxicity import Toxicity

    if isinstance(own, DecontaminateOptions):
        return Decontaminate(own, files[own.against])
    if isinstance(own, ClassifyOptions):
        return Classify(own, files[own.model])
    if isinstance(own, GroupsOptions):
        return Groups(own)
    return Toxicity(own, files.get(own.words or "", ()), files.get(own.model or "", ()))


def put(table: Any, name: str, values: Any) -> Any:
    """The table with a column, which replaces one of the same name."""
    if name in table.column_names:
        table = table.drop_columns([name])
    return table.append_column(name, values)


def with_reason(table: Any, reasons: Any) -> Any:
    """The table with a `reason` column (a string array, null = kept)."""
    return put(table, REASON, reasons)


def reasons_from(masks: list[tuple[str, npt.NDArray[np.bool_]]], rows: int) -> Any:
    """A reason for each row: the first of `masks` that is true there, or null."""
    codes = np.full(rows, -1, np.int32)
    for index in range(len(masks) - 1, -1, -1):
        codes[masks[index][1]] = index
    names = pa.array([name for name, _ in masks], pa.string())
    return pa.DictionaryArray.from_arrays(pa.array(codes, mask=codes < 0), names).cast(pa.string())


def split(table: Any) -> tuple[Any, Any]:
    """(kept without `reason` and `detail`, removed with them)."""
    if REASON not in table.column_names:
        return table, table.slice(0, 0).append_column(REASON, pa.array([], pa.string()))
    keep = table[REASON].is_null()
    own = [name for name in (REASON, DETAIL) if name in table.column_names]
    if pa.compute.all(keep).as_py() is not False:
        return table.drop_columns(own), table.slice(0, 0)
    return table.filter(keep).drop_columns(own), table.filter(pa.compute.invert(keep))
