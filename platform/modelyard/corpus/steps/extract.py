"""Main content out of HTML that came in a column, for instance of JSONL or Parquet files."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from modelyard.corpus.options import HtmlOptions
from modelyard.corpus.read.html import Page, TooDeep, extract
from modelyard.corpus.step import Step, with_reason


class Extract(Step):
    """Replaces the HTML in `text` by its text and adds the column `title`. See `HtmlOptions`.

    A page without text is removed as `extract_no_content`, one that nests too deep as `extract_too_deep`;
    both keep their HTML for the audit.
    """

    name = "extract"

    def __init__(self, options: HtmlOptions) -> None:
        super().__init__()
        self.options = options

    @property
    def adds(self) -> tuple[str, ...]:
        """`title`: the page's own, null where it has none."""
        return ("title",)

    def __call__(self, table: Any) -> Any:
        pages = [self._page(html) for html in table["text"].to_pylist()]
        kept = pa.array([reason is None for _, reason in pages], pa.bool_())
        texts = pc.if_else(kept, pa.array([page.text for page, _ in pages], pa.string()), table["text"])
        index = table.column_names.index("text")
        table = table.set_column(index, "text", texts)
        if "title" in table.column_names:
            table = table.drop_columns(["title"])
        table = table.append_column("title", pa.array([page.title for page, _ in pages], pa.string()))
        return with_reason(table, pa.array([reason for _, reason in pages], pa.string()))

    def _page(self, html: str) -> tuple[Page, str | None]:
        try:
            page = extract(html, self.options)
        except TooDeep:
            return Page(""), "extract_too_deep"
        return page, None if page.text.strip() else "extract_no_content"
