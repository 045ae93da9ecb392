"""Reward models at work: the score of conversations as token ids, many in one packed forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from modelyard.align.answered import Answered
from modelyard.align.objectives import document_rewards
from modelyard.align.reward_model import load_classifier
from modelyard.models.build import check_shape
from modelyard.train.pairs import assign

Floats = npt.NDArray[np.float64]
_ROW_TOKENS = 512
_BATCH_TOKENS = 8192
"""Tokens of a packed row (or the longest conversation), and of one forward pass."""


class RewardScorer:
    """A sequence classifier of one output, as `reward` stages write it.

    Args:
        folder: the classifier.
        device: where it computes, in float32.
        longest: tokens of the longest conversation it will see, as far as that is known.

    Attributes:
        room: tokens of a conversation at most; None = any number.

    Raises:
        DataError: the folder is no reward model.
        RecipeError: conversations are longer than the model takes.
    """

    def __init__(self, folder: Path, device: torch.device, longest: int) -> None:
        model: Any = load_classifier(folder)
        check_shape(model.config, longest)
        self._model = model.to(device).eval().requires_grad_(False)
        self.room: int | None = getattr(model.config, "max_position_embeddings", None)
        self._device, self._pad = device, int(model.config.pad_token_id or 0)

    @torch.no_grad()
    def __call__(self, conversations: Sequence[Sequence[int]]) -> Floats:
        """The score at the last token of every conversation, [n]; none may be empty."""
        found = np.zeros(len(conversations))
        lengths = [len(ids) for ids in conversations]
        width = max([_ROW_TOKENS, *lengths])
        rows = assign(lengths, width)
        size = max(1, _BATCH_TOKENS // width)
        for start in range(0, len(rows), size):
            members = rows[start : start + size]
            scores, _ = document_rewards(self._model, self._batch(conversations, members, width))
            for row, items in enumerate(members):
                found[items] = scores[row, : len(items)].double().cpu().numpy()
        return found

    def _batch(
        self, conversations: Sequence[Sequence[int]], rows: Sequence[Sequence[int]], width: int
    ) -> dict[str, torch.Tensor]:
        ids = np.full((len(rows), width), self._pad, dtype=np.int64)
        documents = np.full((len(rows), width), -1, dtype=np.int32)
        for row, items in enumerate(rows):
            at = 0
            for number, item in enumerate(items):
                end = at + len(conversations[item])
                ids[row, at:end], documents[row, at:end] = conversations[item], number
                at = end
        arrays = {"input_ids": ids, "document_ids": documents}
        return {name: torch.from_numpy(array).to(self._device) for name, array in arrays.items()}


class Ensemble:
    """Several reward models as one source: their mean, or the least of them (Coste et al. 2023, arXiv 2310.02743)."""

    def __init__(self, scorers: Sequence[RewardScorer], how: Literal["mean", "min"]) -> None:
        self._scorers, self._how = scorers, how

    def __call__(self, answers: Sequence[Answered]) -> list[float]:
        """Scores of the answers with their prompts."""
        if not answers:
            return []
        scores = np.stack([scorer([a.ids for a in answers]) for scorer in self._scorers])
        whole: Floats = scores.mean(axis=0) if self._how == "mean" else scores.min(axis=0)
        return [float(score) for score in whole]

    def close(self) -> None:
        """Holds nothing that must be closed."""
