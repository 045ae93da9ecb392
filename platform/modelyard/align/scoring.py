"""Models that score answers and keep nothing of them: reward models, and the model before training as reference.

`begin` is how both are asked: a model of this process scores when its results are waited for, one that is played by
actors elsewhere (`stages.scorers`) begins at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer

from modelyard.align.answered import Answered
from modelyard.align.objectives import token_rewards
from modelyard.align.options import RolloutEngine
from modelyard.align.reward_model import load_classifier, separator_of
from modelyard.align.reward_options import StepsRule
from modelyard.align.steps import StepEnds, of_steps
from modelyard.engine import Request, generate
from modelyard.engine.choose import stepper
from modelyard.models.build import check_shape
from modelyard.train.pairs import assign

Floats = npt.NDArray[np.float64]
_ROW_TOKENS = 512
_BATCH_TOKENS = 8192
"""Tokens of a packed row (or the longest conversation), and of one forward pass."""


Wait = Callable[[], Any]
"""Waits for results."""


class Scorer(Protocol):
    """A model that scores token ids."""

    def begin(self, items: Sequence[Any]) -> Wait:
        """Begins with `items`; what is returned waits for their results, one each in their order."""
        ...


class Here:
    """A scorer of this process: there is nobody beside whom it could begin, so it scores when it is waited for."""

    def __call__(self, items: Sequence[Any]) -> Any:
        """The results of items."""
        raise NotImplementedError

    def begin(self, items: Sequence[Any]) -> Wait:
        """See `Scorer`."""
        return lambda: self(items)


Written = tuple[tuple[int, ...], int]
"""Token ids of a prompt with its answer, and where the answer begins."""


class ReferenceScorer(Here):
    """The model before training, of a policy that has no adapter to switch off: an engine that only scores.

    Args:
        folder: the model.
        settings: of the engine.

    Raises:
        DataError, ResourceError: as `engine.choose.start`.
    """

    def __init__(self, folder: Path, settings: RolloutEngine) -> None:
        self._engine = stepper(folder, settings)

    def __call__(self, items: Sequence[Written]) -> list[list[float]]:
        """Log-probabilities (natural) of the answers' tokens."""
        requests = [
            Request(f"reference-{i}", ids, detokenize=False, task="score", prompt_logprobs=0, logprobs_from=start)
            for i, (ids, start) in enumerate(items)
        ]
        return [[t.logprob for t in c.output.prompt_logprobs] for c in generate(self._engine, requests)]


@dataclass(frozen=True)
class ReferenceSetup:
    """How to build a reference, wherever its folder is."""

    settings: RolloutEngine

    def build(self, folder: Path) -> ReferenceScorer:
        """See `ReferenceScorer`."""
        return ReferenceScorer(folder, self.settings)


@dataclass(frozen=True)
class RewardSetup:
    """How to build a reward model, wherever its folder is: the device's type, and tokens of the longest
    conversation."""

    device: str
    longest: int

    def build(self, folder: Path) -> RewardScorer:
        """See `RewardScorer`."""
        return RewardScorer(folder, torch.device(self.device), self.longest)


Setup = ReferenceSetup | RewardSetup


class RewardScorer(Here):
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
        separator = separator_of(model.config)
        words = Tokenizer.from_file(str(folder / "tokenizer.json")) if separator is not None else None
        self._ends = StepEnds(words, separator) if words is not None and separator is not None else None

    @torch.no_grad()
    def __call__(self, items: Sequence[Written]) -> list[list[float]]:
        """Scores of every conversation, which may not be empty: the one at its last token; of a process reward model
        the probability of every step of the answer to be right."""
        found: list[list[float]] = [[] for _ in items]
        conversations = [ids for ids, _ in items]
        lengths = [len(ids) for ids in conversations]
        width = max([_ROW_TOKENS, *lengths])
        rows = assign(lengths, width)
        size = max(1, _BATCH_TOKENS // width)
        for start in range(0, len(rows), size):
            members = rows[start : start + size]
            scores = token_rewards(self._model, self._batch(conversations, members, width)).double().cpu()
            for row, packed in enumerate(members):
                at = 0
                for item in packed:
                    found[item] = self._read(scores[row, at : at + lengths[item]], items[item])
                    at += lengths[item]
        return found

    def _read(self, scores: torch.Tensor, item: Written) -> list[float]:
        """Of the scores at all tokens of a conversation those that count."""
        if self._ends is None:
            return [float(scores[-1])]
        return [float(score) for score in scores[self._ends(*item)].sigmoid()]

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
    """Several reward models as one source: their mean, or the least of them (Coste et al. 2023, arXiv 2310.02743). Of
    each the scores of an answer's steps first become one by the rule `steps`."""

    def __init__(self, scorers: Sequence[Scorer], how: Literal["mean", "min"], steps: StepsRule) -> None:
        self._scorers, self._how, self._steps = scorers, how, steps

    def __call__(self, answers: Sequence[Answered]) -> list[float]:
        """Scores of the answers with their prompts."""
        if not answers:
            return []
        waits = [scorer.begin([(a.ids, a.start) for a in answers]) for scorer in self._scorers]
        scores = np.asarray([[of_steps(steps, self._steps) for steps in wait()] for wait in waits])
        whole: Floats = scores.mean(axis=0) if self._how == "mean" else scores.min(axis=0)
        return [float(score) for score in whole]

    def close(self) -> None:
        """Holds nothing that must be closed."""
