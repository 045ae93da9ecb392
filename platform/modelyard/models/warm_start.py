"""Weights of one model for another of a different shape: what fits by name and shape is taken over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain

import torch
from transformers import PreTrainedModel

from modelyard.models.build import store

_SHOWN = 4
"""Names a message shows of each kind."""


@dataclass
class TakenOver:
    """Names of parameters: taken over, of another shape, not in the source, and of the source without a use."""

    taken: list[str] = field(default_factory=list)
    reshaped: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [f"{len(self.taken)} tensors taken over"]
        for names, what in ((self.reshaped, "of another shape"), (self.fresh, "not there, kept as initialised"),
                            (self.unused, "of the source left out")):  # fmt: skip
            if names:
                more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
                parts.append(f"{len(names)} {what} ({', '.join(names[:_SHOWN])}{more})")
        return "; ".join(parts)


@torch.no_grad()
def take_over(parameters: Mapping[str, torch.Tensor], source: PreTrainedModel) -> TakenOver:
    """Copies into `parameters` what `source` has under the same name and in the same shape, in place.

    Args:
        parameters: of the model to fill, by name; DTensors keep their shard of a whole tensor, nothing is sent.
        source: a whole model on the CPU.
    """
    given = {name: value for name, value in source.state_dict().items() if value.is_floating_point()}
    found = TakenOver()
    for name, parameter in parameters.items():
        if name not in given:
            found.fresh.append(name)
        elif tuple(given[name].shape) != tuple(parameter.shape):
            shapes = " for ".join("x".join(map(str, value.shape)) for value in (given[name], parameter))
            found.reshaped.append(f"{name} {shapes}")
        else:
            store(parameter, given[name])
            found.taken.append(name)
    # A tied weight has several names in the state, and one here.
    own = {name for name, _ in chain(source.named_parameters(), source.named_buffers())}
    found.unused = sorted((own & set(given)) - set(parameters))
    return found
