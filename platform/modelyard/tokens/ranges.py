"""Token shards read where they lie: one range request a sequence, for data that no worker's disk should hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from modelyard.errors import DataError
from modelyard.storage import filesystem, is_remote, join, list_files, read_bytes
from modelyard.tokens.shards import INDEX, Index, TokenDataset, parse_index


class RangedTokens(TokenDataset):
    """The sequences of a remote token folder, by ranges of its objects. Open it with :func:`open_in_place`.

    A record is one contiguous range (`tokens.shards`), so a sequence costs one request of its own size, and a batch
    costs the time of the slowest of them: they are made together.
    """

    def __init__(self, uri: str, index: Index) -> None:
        super().__init__(Path(), index)
        self.uri = uri

    def __reduce__(self) -> tuple[object, ...]:
        return RangedTokens, (self.uri, self.index)

    def _place(self, shard: int) -> str:
        return join(self.uri, self.index.shards[shard].file)

    def _records(self, shard: int, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.void]:
        fs, path = filesystem(self._place(shard))
        size = self._dtype.itemsize
        starts = [int(row) * size for row in rows]
        found = fs.cat_ranges([path] * len(starts), starts, [start + size for start in starts], on_error="return")
        for part in found:
            if isinstance(part, Exception) or len(part) != size:
                what = part if isinstance(part, Exception) else "it is cut short"
                raise DataError(f"cannot read a token shard: {what}", place=self._place(shard))
        return np.frombuffer(b"".join(found), dtype=self._dtype)


def open_in_place(uri: str) -> TokenDataset:
    """Opens the token folder at a URI without copying it: mapped where it is a local path, by ranges where it is not.

    Presence and size of every shard are checked; checksums are not, that would read everything.

    Raises:
        DataError: the index or a shard is missing or damaged, a shard is cut short, or there are no sequences.
    """
    if not is_remote(uri):
        return TokenDataset.open(filesystem(uri)[1], verify=False)
    place = join(uri, INDEX)
    index = parse_index(read_bytes(place), place)
    if not index.shards:
        raise DataError("the token folder holds no sequences", place=uri, mend="tokenize more text")
    sizes = dict(list_files(uri))
    for shard in index.shards:
        if sizes.get(shard.file) != shard.bytes:
            raise DataError(
                f"a token shard has {sizes.get(shard.file, 0):,} bytes where the index says {shard.bytes:,}",
                place=join(uri, shard.file),
                mend="remove the token artifact and run the tokenize stage again",
            )
    return RangedTokens(uri, index)
