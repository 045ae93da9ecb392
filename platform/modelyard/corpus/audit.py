"""The audit: one row for everything that did not come through, with the step and the reason."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

EXCERPT = 400  # characters of a removed text that the audit keeps
MARGIN = 512  # more of it, so that an entity across the cut is still seen when excerpts are scrubbed

AUDIT_SCHEMA = pa.schema(
    [
        ("id", pa.string()), ("source", pa.string()), ("step", pa.string()), ("reason", pa.string()),
        ("twin", pa.string()), ("jaccard", pa.float64()), ("bytes", pa.int64()), ("text", pa.string()),
        ("offset", pa.int64()), ("detail", pa.string()),
    ]
)  # fmt: skip


def audit_table(rows: list[dict[str, Any]]) -> Any:
    """Audit rows from dictionaries; what a row lacks is null."""
    return pa.Table.from_pylist(rows, schema=AUDIT_SCHEMA)


def removed(table: Any, step: str) -> Any:
    """Audit rows for removed documents, with `twin`, `jaccard`, `detail` where given; cut to EXCERPT + MARGIN."""
    n = table.num_rows
    columns = {
        "id": table["id"], "source": table["source"], "step": pa.array([step] * n, pa.string()),
        "reason": table["reason"], "bytes": pc.cast(pc.binary_length(table["text"]), pa.int64()),
        "text": pc.utf8_slice_codeunits(table["text"], 0, EXCERPT + MARGIN),
    }  # fmt: skip
    for name in ("twin", "jaccard", "detail"):
        if name in table.column_names:
            columns[name] = table[name]
    arrays = [columns.get(f.name, pa.nulls(n, f.type)) for f in AUDIT_SCHEMA]
    return pa.table(arrays, schema=AUDIT_SCHEMA)
