"""Any causal model transformers can run, behind the same scheduler and sampler (`backend: transformers`).

Requests that start in the same step form a static batch, padded on the left, with a key/value cache of its own;
rows that have ended are carried along until the batch has. Slower than the native decoder, and without prefix cache,
guesses or adapters, but it asks nothing of the architecture.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modelyard.engine.batch import Span, StepBatch
from modelyard.engine.checkpoint import read_json
from modelyard.engine.weights import Module
from modelyard.errors import DataError


@dataclass(frozen=True)
class Facts:
    """What the step loop asks of a model's config."""

    vocabulary: int
    positions: int
    end_tokens: tuple[int, ...]

    def length(self, wanted: int | None) -> int:
        """Tokens a prompt and its answer may have together when `wanted` are asked for."""
        return min(self.positions, wanted or self.positions)


@dataclass
class _Cohort:
    """Requests that started together: their slots by row, their mask [rows, tokens] and their cache."""

    slots: list[int]
    mask: Tensor
    cache: Any = None


class _Tensors:
    """Replaces tensors of a transformers model by name."""

    modules: dict[str, Module] = {}  # noqa: RUF012 - no adapter fits
    share = None

    def __init__(self, model: Any) -> None:
        self._own = dict(model.named_parameters()) | dict(model.named_buffers())

    @torch.no_grad()
    def update(self, tensors: Iterable[tuple[str, Tensor]], place: str) -> set[str]:
        """Replaces the named tensors and returns their names. Raises DataError for an unknown or misshapen one."""
        done = set()
        for name, value in tensors:
            own = self._own.get(name)
            if own is None or own.shape != value.shape:
                raise DataError(
                    f"tensor {name} of shape {tuple(value.shape)} has no place in this model",
                    place=place,
                    mend="use the names and shapes of the checkpoint",
                )
            own.copy_(value)
            done.add(name)
        return done


class AnyArchitecture:
    """A transformers model with the interface of `decoder.Decoder`.

    Raises DataError when transformers cannot load the folder without remote code.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        try:
            self._model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False, use_safetensors=True
            ).eval()
        except (ValueError, OSError, KeyError) as error:
            raise DataError(f"transformers cannot load it: {error}", place=str(folder), mend="see above") from error
        parameters = inspect.signature(self._model.forward).parameters
        self._positions = "position_ids" in parameters
        self.weights = _Tensors(self._model)
        self.facts = _facts(self._model.config, folder)
        self._width = self.facts.vocabulary
        self._cohorts: list[_Cohort] = []

    @torch.inference_mode()
    def forward(self, batch: StepBatch) -> Tensor:
        """Logits and last results side by side for the wanted rows, float32 [wanted, vocabulary + hidden]."""
        results: list[Tensor | None] = [None] * len(batch.spans)
        starting = [(i, s) for i, s in enumerate(batch.spans) if s.piece.start == 0]
        if starting:
            self._start(starting, results)
        for cohort in self._cohorts:
            mine = {s.piece.sequence.slot: (i, s) for i, s in enumerate(batch.spans) if s.piece.start}
            if any(slot in mine for slot in cohort.slots):
                self._go_on(cohort, mine, results)
        return torch.cat([r for r in results if r is not None])

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits among what `forward` returned."""
        return hidden[:, : self._width].clone()

    def update(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Replaces tensors by name. Raises DataError for an unknown or misshapen one."""
        self.weights.update(tensors, place="update_weights")

    def vectors(self, hidden: Tensor) -> Tensor:
        """The last layer's results among what `forward` returned."""
        return hidden[:, self._width :]

    def _start(self, spans: list[tuple[int, Span]], results: list[Tensor | None]) -> None:
        taken = {s.piece.sequence.slot for _, s in spans}
        for cohort in self._cohorts:
            cohort.slots = [-1 if slot in taken else slot for slot in cohort.slots]
        self._cohorts = [c for c in self._cohorts if any(slot >= 0 for slot in c.slots)]
        longest = max(s.piece.count for _, s in spans)
        ids = torch.zeros(len(spans), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, (_, span) in enumerate(spans):
            ids[row, longest - span.piece.count :] = torch.tensor(span.piece.tokens)
            mask[row, longest - span.piece.count :] = 1
        cohort = _Cohort([s.piece.sequence.slot for _, s in spans], mask)
        self._cohorts.append(cohort)
        out = self._run(cohort, ids)
        for row, (index, span) in enumerate(spans):
            results[index] = out[row, longest - (span.last - span.first) :]

    def _go_on(self, cohort: _Cohort, mine: dict[int, tuple[int, Span]], results: list[Tensor | None]) -> None:
        ids = torch.zeros(len(cohort.slots), 1, dtype=torch.int64)
        for row, slot in enumerate(cohort.slots):
            if slot in mine:
                ids[row, 0] = mine[slot][1].piece.tokens[-1]
        cohort.mask = torch.cat((cohort.mask, torch.ones_like(ids)), dim=1)
        out = self._run(cohort, ids)
        for row, slot in enumerate(cohort.slots):
            if slot in mine:
                results[mine[slot][0]] = out[row]

    def _run(self, cohort: _Cohort, ids: Tensor) -> Tensor:
        """[rows, tokens, vocabulary + hidden]."""
        extra: dict[str, Any] = {}
        if self._positions:
            extra["position_ids"] = (cohort.mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        out = self._model(
            input_ids=ids,
            attention_mask=cohort.mask,
            past_key_values=cohort.cache,
            use_cache=True,
            output_hidden_states=True,
            **extra,
        )
        cohort.cache = out.past_key_values
        return torch.cat((out.logits.float(), out.hidden_states[-1].float()), dim=-1)


def _facts(config: Any, folder: Path) -> Facts:
    text = config.get_text_config()
    generation = read_json(folder / "generation_config.json", missing={})
    ends = generation.get("eos_token_id", text.eos_token_id)
    positions = getattr(text, "max_position_embeddings", None) or 2048
    return Facts(
        vocabulary=int(text.vocab_size),
        positions=int(positions),
        end_tokens=() if ends is None else tuple(ends) if isinstance(ends, list) else (int(ends),),
    )
