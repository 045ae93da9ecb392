"""Between Arrow string arrays and the (data, offsets) pairs that kernels read, without copies of text."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Bytes = npt.NDArray[np.uint8]
Offsets = npt.NDArray[np.int64]


def buffers(column: Any) -> tuple[Bytes, Offsets]:
    """The UTF-8 bytes and int64 offsets [documents + 1] of a string column. Nulls read as empty.

    The bytes are a view on the Arrow buffer (one chunk) and must not be written.
    """
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], pa.string())
    if array.null_count:
        array = pc.fill_null(array, "")
    wide = pa.types.is_large_string(array.type) or pa.types.is_large_binary(array.type)
    _, offsets, data = array.buffers()
    if len(array) == 0 or offsets is None:
        return np.zeros(0, np.uint8), np.zeros(len(array) + 1, np.int64)
    places = np.frombuffer(offsets, np.int64 if wide else np.int32)[array.offset : array.offset + len(array) + 1]
    content = np.zeros(0, np.uint8) if data is None else np.frombuffer(data, np.uint8)
    return content, places.astype(np.int64)


def strings(data: Bytes, offsets: Offsets) -> Any:
    """A string array over `data` [bytes of valid UTF-8] and `offsets` that start at 0."""
    kind, width = (pa.string(), np.int32) if offsets[-1] < 2**31 else (pa.large_string(), np.int64)
    places = pa.py_buffer(np.ascontiguousarray(offsets.astype(width)))
    return pa.Array.from_buffers(kind, len(offsets) - 1, [None, places, pa.py_buffer(data)])


def lengths(column: Any) -> npt.NDArray[np.int64]:
    """Bytes of each string."""
    return np.asarray(pc.fill_null(pc.binary_length(column), 0).to_numpy(zero_copy_only=False), np.int64)


def replace(column: Any, rows: npt.NDArray[np.int64], texts: list[str]) -> Any:
    """The column with `texts` at `rows` (ascending); other rows are copied as bytes, not as Python objects."""
    if not len(rows):
        return column
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    mask = np.zeros(len(array), bool)
    mask[rows] = True
    return pc.replace_with_mask(array, pa.array(mask), pa.array(texts, array.type))
