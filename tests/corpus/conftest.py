"""Makes the slow twins of the kernels importable, and a few documents every test can use."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def documents() -> Any:
    """Builds a table of documents from texts."""

    def build(*texts: str, **columns: list[Any]) -> pa.Table:
        ids = [f"{number:032x}" for number in range(len(texts))]
        table = {"id": ids, "text": list(texts), "source": ["memory"] * len(texts), "meta": ["{}"] * len(texts)}
        strings = {name: pa.array(values, pa.string()) for name, values in table.items()}
        return pa.table(strings | {name: pa.array(values) for name, values in columns.items()})

    return build


@pytest.fixture(scope="session")
def prose(documentation: Path) -> list[str]:
    """A few hundred real texts of installed packages."""
    names = sorted(p for p in documentation.rglob("*") if p.suffix in (".md", ".rst", ".txt") and p.is_file())
    texts = []
    for name in names[:400]:
        try:
            texts.append(name.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            continue
    return [t for t in texts if 0 < len(t) < 40_000]
