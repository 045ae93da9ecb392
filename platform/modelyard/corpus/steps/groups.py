"""Which groups of people a document names, and how many of each the steps after this one drop.

Filters for toxicity and quality are known to drop texts by and about minorities more often (Dodge et al.
2021, arXiv:2104.08758); the counts make that visible for one's own corpus. Naming is not belonging: a
document counts for every group that any of its words stands for.
"""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from modelyard.corpus.arrow import buffers
from modelyard.corpus.filter_options import GroupsOptions
from modelyard.corpus.step import Step, put, with_reason

COLUMN = "identity_groups"

TERMS: dict[str, tuple[str, ...]] = {
    "women": ("woman", "women", "girl", "girls", "female", "females", "lady", "ladies"),
    "men": ("man", "men", "boy", "boys", "male", "males", "gentleman", "gentlemen"),
    "lesbian_gay_bisexual": ("gay", "gays", "lesbian", "lesbians", "bisexual", "bisexuals", "homosexual", "homosexuals",
                             "lgbt", "lgbtq", "queer"),
    "transgender": ("transgender", "transsexual", "trans woman", "trans women", "trans man", "trans men", "nonbinary"),
    "heterosexual": ("heterosexual", "heterosexuals", "straight people"),
    "black": ("black people", "black person", "black man", "black men", "black woman", "black women",
              "african american", "african americans"),
    "white": ("white people", "white person", "white man", "white men", "white woman", "white women", "caucasian",
              "caucasians"),
    "asian": ("asian", "asians", "chinese", "japanese", "korean", "koreans", "vietnamese", "filipino", "filipinos"),
    "latino": ("latino", "latinos", "latina", "latinas", "hispanic", "hispanics", "mexican", "mexicans"),
    "arab": ("arab", "arabs", "middle eastern"),
    "indigenous": ("native american", "native americans", "indigenous", "aboriginal", "first nations"),
    "roma": ("roma people", "romani", "sinti"),
    "muslim": ("muslim", "muslims", "islam", "islamic"),
    "jewish": ("jew", "jews", "jewish", "judaism"),
    "christian": ("christian", "christians", "catholic", "catholics", "protestant", "protestants"),
    "hindu": ("hindu", "hindus", "hinduism"),
    "buddhist": ("buddhist", "buddhists", "buddhism"),
    "atheist": ("atheist", "atheists", "atheism"),
    "disabled": ("disabled", "disability", "disabilities", "deaf", "blind people", "wheelchair", "autistic", "autism"),
    "older": ("elderly", "older people", "senior citizens", "seniors"),
    "younger": ("teenager", "teenagers", "young people", "millennials"),
    "immigrant": ("immigrant", "immigrants", "refugee", "refugees", "asylum seeker", "asylum seekers", "migrants"),
    "poor": ("poor people", "homeless"),
}  # fmt: skip


@functools.lru_cache(4)
def _phrases(pairs: tuple[tuple[str, str], ...]) -> Any:
    from modelyard.corpus.kernels.phrases import Phrases

    data, offsets = buffers(pa.array([term for _, term in pairs], pa.large_string()))
    return Phrases.build(data, offsets, max(len(term) for _, term in pairs) + 1, 1)


class Groups(Step):
    """Adds the column `identity_groups`. See `GroupsOptions`."""

    name = "groups"

    def __init__(self, options: GroupsOptions) -> None:
        super().__init__()
        terms = TERMS if options.terms is None else options.terms
        pairs = tuple((group, term) for group, listed in terms.items() for term in listed)
        self._groups = [group for group, _ in pairs]
        self._phrases = _phrases(pairs) if pairs else None

    @property
    def adds(self) -> tuple[str, ...]:
        """`identity_groups`: string, names of the groups in order with commas; empty where there is none."""
        return (COLUMN,)

    def __call__(self, table: Any) -> Any:
        named: list[set[str]] = [set() for _ in range(table.num_rows)]
        if self._phrases is not None:
            hits, _ = self._phrases.find(*buffers(table["text"]))
            for document, item in np.unique(hits[:, :2], axis=0).tolist():
                named[document].add(self._groups[item])
        for groups in named:
            self.counts.update(f"documents_{group}" for group in groups)
        column = pa.array([",".join(sorted(groups)) for groups in named], pa.string())
        return with_reason(put(table, COLUMN, column), pa.nulls(table.num_rows, pa.string()))


_OTHERWISE = ("scrub", "language")  # steps whose own counts have the form row/column


def count(step: str, kept: Any, gone: Any) -> Counter[str]:
    """`NAME/kept` and `NAME/dropped` of a step; documents that name nobody count under `(none)`."""
    counts: Counter[str] = Counter()
    if COLUMN not in kept.column_names or step in _OTHERWISE:
        return counts
    for table, fate in ((kept, "kept"), (gone, "dropped")):
        if COLUMN not in table.column_names or not table.num_rows:
            continue
        for item in pc.value_counts(table[COLUMN]).to_pylist():
            for group in (item["values"] or "(none)").split(","):
                counts[f"{group}/{fate}"] += item["counts"]
    return counts
