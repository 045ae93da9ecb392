"""Several models of one architecture made into one, tensor by tensor: linear, SLERP, TIES.

Everything is computed in float64 and returned in float32; tensors of one name have one shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open

from modelyard.errors import DataError
from modelyard.models.vocabulary import extends_vocabulary

Method = Literal["linear", "slerp", "ties"]
Tensors = Sequence[torch.Tensor]


def linear(tensors: Tensors, weights: Sequence[float]) -> torch.Tensor:
    """The weighted mean (model soups: Wortsman et al. 2022, arXiv 2203.05482)."""
    total = sum(weights)
    found = sum((t.double() * (w / total) for t, w in zip(tensors, weights, strict=True)), torch.zeros(()).double())
    return found.float()


def slerp(tensors: Tensors, weights: Sequence[float]) -> torch.Tensor:
    """Two tensors along the arc between them, as vectors (Shoemake 1985); lengths are those of the arc's ends.

    Nearly parallel ones (and zeros) go by a straight line, where the arc is one.
    """
    one, other = (t.double() for t in tensors)
    share = weights[1] / (weights[0] + weights[1])
    lengths = float(one.norm() * other.norm())
    cosine = float((one * other).sum()) / lengths if lengths else 1.0
    if abs(cosine) > 1 - 1e-9:
        return linear(tensors, weights)
    angle = torch.acos(torch.tensor(cosine, dtype=torch.float64))
    parts = torch.sin((1 - share) * angle) * one + torch.sin(share * angle) * other
    return (parts / torch.sin(angle)).float()


def ties(base: torch.Tensor, tensors: Tensors, weights: Sequence[float], density: float, scale: float) -> torch.Tensor:
    """Changes against a base, trimmed, agreed in sign and averaged (Yadav et al. 2023, arXiv 2306.01708).

    Args:
        base: what all were trained from.
        tensors: the trained ones.
        weights: of their changes.
        density: share of each change that stays, the largest by magnitude.
        scale: of the merged change (the paper's lambda).
    """
    whole = [_trimmed(t.double() - base.double(), density) * w for t, w in zip(tensors, weights, strict=True)]
    changes = torch.stack(whole)
    sign = torch.sign(changes.sum(dim=0))
    agree = (torch.sign(changes) == sign) & (sign != 0)
    shape = (-1, *[1] * base.ndim)
    count = (agree * torch.tensor(weights, dtype=torch.float64).reshape(shape)).sum(dim=0)
    mean = (changes * agree).sum(dim=0) / count.clamp(min=1e-12)
    return (base.double() + scale * mean).float()


def _trimmed(change: torch.Tensor, density: float) -> torch.Tensor:
    keep = max(1, round(density * change.numel()))
    if keep >= change.numel():
        return change
    least = change.abs().flatten().kthvalue(change.numel() - keep + 1).values
    return torch.where(change.abs() >= least, change, 0.0)


def merge_folders(
    folders: Sequence[Path], base: Path | None, merge: Callable[[torch.Tensor | None, Tensors], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Every tensor of the first folder merged with those of the same name, one at a time; float32.

    Args:
        folders: model folders.
        base: what all were trained from, where the method wants it.
        merge: from the base's tensor and the others' to the merged one.

    Raises:
        DataError: tensors are missing in one of them or have other shapes, or tokenizers differ.
    """
    everyone = [*folders, *([base] if base else [])]
    for other in everyone[1:]:
        _check_tokenizers(everyone[0], other)
    with ExitStack() as stack:
        readers = [stack.enter_context(_reader(folder)) for folder in everyone]
        _check_names([set(reader) for reader in readers], everyone)
        found = {}
        for name in readers[0]:
            tensors = [reader[name]() for reader in readers]
            shapes = {tuple(t.shape) for t in tensors}
            if len(shapes) > 1:
                raise DataError(f"{name} has the shapes {sorted(shapes)}", place=str(everyone[1]),
                                mend="merge models trained from one base")  # fmt: skip
            found[name] = merge(tensors[-1] if base else None, tensors[: len(folders)])
    return found


@contextmanager
def _reader(folder: Path) -> Iterator[dict[str, Callable[[], torch.Tensor]]]:
    """Tensors of a folder by name, each read when it is called for."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise DataError("the folder holds no *.safetensors weights", place=str(folder), mend="save it as safetensors")
    found: dict[str, Callable[[], torch.Tensor]] = {}
    with ExitStack() as stack:
        for file in files:
            opened: Any = stack.enter_context(safe_open(str(file), framework="pt"))
            found |= {name: (lambda o=opened, n=name: o.get_tensor(n)) for name in opened.keys()}  # noqa: SIM118
        yield found


def _check_names(names: Sequence[set[str]], folders: Sequence[Path]) -> None:
    for other, folder in zip(names[1:], folders[1:], strict=True):
        if odd := sorted(names[0] ^ other):
            raise DataError(f"the models differ in {len(odd):,} tensors, the first {odd[0]}", place=str(folder),
                            mend="merge models of one architecture")  # fmt: skip


def _check_tokenizers(one: Path, other: Path) -> None:
    files = [folder / "tokenizer.json" for folder in (one, other)]
    if not all(file.exists() for file in files):
        return
    first, second = (file.read_bytes() for file in files)
    if not (extends_vocabulary(first, second) and extends_vocabulary(second, first)):
        raise DataError("the models have different tokenizers", place=str(other),
                        mend="merge models trained from one base")  # fmt: skip
