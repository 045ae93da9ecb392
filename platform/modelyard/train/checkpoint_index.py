"""Looks into a checkpoint's index before anything unpickles it.

DCP's `.metadata` is a pickle, and a pickle may name any function to call. Ours names tensors' shapes, types and places
and nothing else: an index that names anything else is refused, unread. The checksum in the marker protects against
damage, this against a file that was made to do harm.
"""

from __future__ import annotations

import enum
import io
import pickle  # to restrict it
from pathlib import Path
from typing import Any

import torch

from modelyard.errors import DataError

_ROOMS = ("torch.distributed.checkpoint.", "torch.distributed._shard.")
_NAMES = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("builtins", "set"),
    ("builtins", "dict"),
    ("pathlib", "Path"),
    ("pathlib", "PosixPath"),
}


def _member(owner: object, name: str) -> enum.Enum:
    """Stands in for `getattr`, by which Python before 3.11.4 pickles the members of an enumeration; nothing else."""
    if isinstance(owner, type) and issubclass(owner, enum.Enum):
        return owner.__members__[name]
    raise DataError(
        f"the checkpoint's index asks for {name!r} of something that is no enumeration",
        mend="do not load checkpoints of others; exchange models as safetensors",
    )


class _Careful(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        known = (module, name) in _NAMES or (module.startswith(_ROOMS) and "." not in name)
        if known or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            found = super().find_class(module, name)
            if (module, name) in _NAMES or isinstance(found, type | torch.dtype):
                return found
        raise DataError(
            f"the checkpoint's index names {module}.{name}, which no checkpoint of ours does",
            mend="do not load checkpoints of others; exchange models as safetensors",
        )


def inspect_index(path: Path) -> None:
    """Reads a `.metadata` file without running anything it names.

    Raises:
        DataError: it names something that is not part of an index.
    """
    try:
        _Careful(io.BytesIO(path.read_bytes())).load()
    except DataError as error:
        error.place = str(path)
        raise
