"""Generation: the batch does not matter, long prompts are cut, the end token ends, a seed repeats."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from modelyard.evaluate.generate import continue_prompts
from modelyard.models import load_model

PAD = 4


def _prompts(n: int, longest: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(5, 300, rng.integers(1, longest)).tolist() for _ in range(n)]


def test_greedy_answers_do_not_depend_on_the_batch(model_folder: Path) -> None:
    model, prompts = load_model(model_folder), _prompts(9, 30)
    told: list[int] = []
    together = continue_prompts(model, prompts, 12, pad_id=PAD, batch=4, done=told.append)
    alone = [continue_prompts(model, [p], 12, pad_id=PAD)[0] for p in prompts]
    assert together == alone
    assert told == [4, 4, 1]
    assert all(len(answer) == 12 for answer in together)


def test_answers_stop_before_the_end_token(model_folder: Path) -> None:
    model, prompts = load_model(model_folder), _prompts(4, 10)
    free = continue_prompts(model, prompts, 12, pad_id=PAD)
    end = free[0][5]
    ended = continue_prompts(model, prompts, 12, pad_id=PAD, end_id=end)
    assert ended == [a[: a.index(end)] if end in a else a for a in free]


def test_prompts_are_cut_where_the_model_ends(model_folder: Path) -> None:
    model = load_model(model_folder)
    long = _prompts(1, 2)[0] * 500
    assert continue_prompts(model, [long], 20, pad_id=PAD) == continue_prompts(model, [long[-108:]], 20, pad_id=PAD)


def test_sampling_repeats_by_seed(model_folder: Path) -> None:
    model, prompts = load_model(model_folder), _prompts(3, 5)
    first, same, other = (
        continue_prompts(model, prompts, 10, pad_id=PAD, temperature=1.0, seed=seed) for seed in (1, 1, 2)
    )
    assert first == same != other
