"""The best of several answers by a reward model: rejection sampling (as in WebGPT, Llama 2 and RAFT)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from modelyard.align.reward_options import StepsRule
from modelyard.errors import DataError, RecipeError
from modelyard.stages.base import PlanContext
from modelyard.stages.rollout_rewards import check_same_tokenizers

if TYPE_CHECKING:
    from modelyard.stages.generate import GenerateOptions


def check_best_of(ctx: PlanContext[GenerateOptions]) -> None:
    """Raises RecipeError for a reward model without `best_of` or the reverse, for answers that would all be the same,
    and for a reward model with another tokenizer."""
    options = ctx.options
    if (options.best_of is None) is ("reward" in options.inputs):
        raise RecipeError("best_of and the input reward go together", place="best_of",
                          mend="give `best_of: {answers: 8}` and `inputs: {reward: <a reward stage>}`")  # fmt: skip
    if options.best_of is not None and not options.sampling.temperature:
        raise RecipeError("at temperature 0 all answers are the same", place="sampling.temperature",
                          mend="give a temperature, as 0.8")  # fmt: skip
    check_same_tokenizers(ctx.inputs, ["reward"] if options.best_of is not None else [])


@dataclass(frozen=True)
class Candidate:
    """One answer as token ids: the end token is among them where it ended by itself."""

    tokens: tuple[int, ...]
    ended: bool


class Chooser:
    """A reward model beside an engine.

    Args:
        model: folder of the model that answers.
        reward: folder of the reward model.
        steps: how the scores of an answer's steps become the answer's.

    Raises:
        RecipeError: the tokenizers differ.
        DataError: the folder is no reward model.
    """

    def __init__(self, model: Path, reward: Path, steps: StepsRule) -> None:
        from transformers import AutoTokenizer

        from modelyard.align.encode import after_answer
        from modelyard.align.same_tokenizer import check_same_tokenizer, read_tokenizer
        from modelyard.align.scoring import RewardScorer
        from modelyard.train.world import current

        check_same_tokenizer(read_tokenizer(model), read_tokenizer(reward), "reward")
        tokenizer: Any = AutoTokenizer.from_pretrained(str(model), local_files_only=True)
        self._after = after_answer(tokenizer) if getattr(tokenizer, "chat_template", None) else ()
        self._scorer, self._steps = RewardScorer(reward, current().device, 1), steps
        # Threads score rows; the scorer reads its model's last layer by a hook that another's pass would reach.
        self._alone = Lock()

    def scores(self, prompt: Sequence[int], candidates: Sequence[Candidate]) -> list[float]:
        """The reward of each answer to a prompt. Raises DataError where they are longer than the reward model takes."""
        from modelyard.align.steps import of_steps

        talks = [(*prompt, *c.tokens, *(self._after if c.ended else ())) for c in candidates]
        longest = max(map(len, talks))
        if self._scorer.room is not None and longest > self._scorer.room:
            raise DataError(f"prompt and answer have {longest:,} tokens, the reward model takes {self._scorer.room:,}")
        with self._alone:
            scores = self._scorer([(talk, len(prompt)) for talk in talks])
        return [of_steps(steps, self._steps) for steps in scores]
