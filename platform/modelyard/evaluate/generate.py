"""Continuing prompts in batches, greedily or by sampling from a fixed seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

Prompt = Sequence[int]


@torch.no_grad()
def continue_prompts(
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    new_tokens: int,
    *,
    pad_id: int,
    end_id: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    batch: int = 32,
    done: Callable[[int], object] = lambda n: None,
) -> list[list[int]]:
    """Generates up to `new_tokens` tokens after each prompt.

    Prompts of like length go together, padded on the left, so that little is computed for padding.
    They are cut at their beginning where prompt and answer would pass the model's longest sequence.

    Args:
        model: a causal language model.
        prompts: token ids, at least one each.
        new_tokens: tokens to generate at most.
        pad_id: fills shorter prompts and follows an ended answer.
        end_id: ends an answer; None = none does.
        temperature: 0 = greedy, else divides the logits before sampling.
        seed: of the sampling; the same prompts in the same order give the same answers.
        batch: prompts in a forward pass.
        done: told the number of prompts of each batch.

    Returns:
        the new tokens of each prompt, without the end token and what follows it.
    """
    model.eval()
    longest = getattr(model.config, "max_position_embeddings", None)
    room = max(1, longest - new_tokens) if longest else None
    cut = [list(p)[-room:] if room else list(p) for p in prompts]
    order = sorted(range(len(cut)), key=lambda i: (len(cut[i]), i))
    answers: list[list[int]] = [[] for _ in cut]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for first in range(0, len(order), batch):
            rows = order[first : first + batch]
            for row, answer in zip(
                rows, _batch(model, [cut[i] for i in rows], new_tokens, pad_id, end_id, temperature), strict=True
            ):
                answers[row] = answer
            done(len(rows))
    return answers


def _batch(
    model: PreTrainedModel,
    prompts: list[list[int]],
    new_tokens: int,
    pad_id: int,
    end_id: int | None,
    temperature: float,
) -> list[list[int]]:
    width = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    sampling: dict[str, Any] = (
        {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        if temperature
        else {"do_sample": False}
    )
    out: Any = model.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=new_tokens,
        pad_token_id=pad_id,
        eos_token_id=end_id,
        use_cache=True,
        **sampling,
    )
    return [_until(row, end_id) for row in out[:, width:].tolist()]


def _until(tokens: list[int], end_id: int | None) -> list[int]:
    return tokens[: tokens.index(end_id)] if end_id in tokens else tokens
