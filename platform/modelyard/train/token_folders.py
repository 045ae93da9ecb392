"""Several token folders as one data set: each is a source, or several, that a mixture can weigh."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modelyard.errors import DataError
from modelyard.tokens import TokenDataset
from modelyard.tokens.shards import Shard, Source, make_index


def open_tokens(folders: Mapping[str, Path], side: str, *, verify: bool) -> TokenDataset | None:
    """The sequences of `side` (`train`, `heldout`) of every folder that has it, in the order given; None = none has.

    A folder with one source is a source under its own name; those with several are `name/source`.

    Raises:
        DataError: a folder is damaged, or they differ in tokenizer, vocabulary or sequence length.
    """
    found = {
        name: TokenDataset.open(folder / side, verify=verify)
        for name, folder in folders.items()
        if side == "train" or (folder / side / "index.json").exists()
    }
    if len(found) < 2:
        return next(iter(found.values()), None)
    _check_alike({name: folders[name] for name in found}, found)
    sources: list[Source] = []
    shards: list[Shard] = []
    for name, data in found.items():
        before = len(sources)
        for shard in data.index.shards:
            # A file given by its whole path is found from any folder.
            place = str(data.folder.absolute() / shard.file)
            shards.append(shard.model_copy(update={"file": place, "source": before + shard.source}))
        many = len(data.sources) > 1
        sources += [s.model_copy(update={"name": f"{name}/{s.name}" if many else name}) for s in data.sources]
    first = next(iter(found.values()))
    return TokenDataset(first.folder, make_index(first.sequence_length, first.vocab_size, shards, sources))


def check_shapes(shapes: Mapping[str, Mapping[str, Any]], places: Mapping[str, str]) -> None:
    """Compares the `sequence_length` and `vocab_size` of token folders, by name, of which `places` says where they are.

    Raises:
        DataError: one is not as the first.
    """
    first = next(iter(shapes))
    for name, shape in shapes.items():
        for what in ("sequence_length", "vocab_size"):
            if shape[what] != shapes[first][what]:
                raise DataError(
                    f"{name} has a {what} of {shape[what]:,}, {first} of {shapes[first][what]:,}",
                    place=places[name],
                    mend="tokenize all with one tokenizer (tokenizer: {path: ...}) and one sequence_length",
                )


def _check_alike(folders: Mapping[str, Path], found: Mapping[str, TokenDataset]) -> None:
    check_shapes(
        {name: dict(data.index) for name, data in found.items()},
        {name: str(data.folder) for name, data in found.items()},
    )
    first = next(iter(found))
    for name, data in found.items():
        files = [folders[each] / "tokenizer" / "tokenizer.json" for each in (first, name)]
        if len({file.read_bytes() for file in files if file.exists()}) > 1:
            raise DataError(
                f"{name} and {first} come from different tokenizers",
                place=str(data.folder),
                mend="tokenize all with one tokenizer (tokenizer: {path: ...})",
            )
