"""Text that a model in training writes, so that a person sees it learn."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import nn

from modelyard import storage
from modelyard.train.metrics import Say
from modelyard.train.parallel.strategy import Strategy
from modelyard.train.run_options import SampleOptions
from modelyard.train.world import World


def writes_text(strategy: Strategy, say: Say) -> bool:
    """Whether the model can continue a prompt by whole forward passes; says why where it cannot."""
    config = getattr(strategy.model, "config", None)
    decoder = not getattr(config, "is_encoder_decoder", False)
    whole = not isinstance(strategy.model, nn.ModuleList)
    if not (decoder and whole) and strategy.world.leads:
        say("no samples of text: " + ("the model is split over a pipeline" if decoder else "it has an encoder"))
    return decoder and whole


class Sampler:
    """Continues the prompts of `options` and writes `samples/step-*.json` below `reports`.

    Every worker makes the same forward passes, because a sharded model computes only together; rank 0 writes. The
    random state of training is left alone.
    """

    def __init__(self, model: nn.Module, tokenizer: Path, options: SampleOptions, world: World, reports: str) -> None:
        self._model, self._options, self._world, self._reports = model, options, world, reports
        self._tokenizer: Tokenizer = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))

    def __call__(self, step: int) -> None:
        """Writes text with the weights as they are after `step` steps."""
        options = self._options
        prompts = [self._tokenizer.encode(prompt, add_special_tokens=False).ids or [0] for prompt in options.prompts]
        written = continue_prompts(self._model, prompts, options.tokens, options.temperature, step, self._world.device)
        if not self._world.leads:
            return
        texts = [self._tokenizer.decode(ids) for ids in written]
        rows = [{"prompt": p, "text": t} for p, t in zip(options.prompts, texts, strict=True)]
        place = storage.join(self._reports, "samples", f"step-{step:08d}.json")
        storage.write_bytes(place, json.dumps(rows, ensure_ascii=False, indent=1).encode())


@torch.no_grad()
def continue_prompts(
    model: nn.Module, prompts: Sequence[Sequence[int]], tokens: int, temperature: float, seed: int, device: torch.device
) -> list[list[int]]:
    """`tokens` further ids for each prompt, drawn with a generator of its own; the model's mode is kept.

    Whole sequences are computed anew for every token: short texts need no cache, and any causal model can do it.
    Rows are padded at the end, where causal attention does not look.
    """
    width = max(map(len, prompts)) + tokens
    ids = torch.zeros(len(prompts), width, dtype=torch.long, device=device)
    ends = torch.tensor([len(p) for p in prompts], device=device)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt, device=device)
    rows, generator = torch.arange(len(prompts), device=device), torch.Generator().manual_seed(seed)
    training = model.training
    model.eval()
    for _ in range(tokens):
        logits = model(input_ids=ids[:, : int(ends.max())], use_cache=False).logits[rows, ends - 1].float().cpu()
        ids[rows, ends] = _draw(logits, temperature, generator).to(device)
        ends += 1
    model.train(training)
    return [ids[row, len(prompt) : int(ends[row])].tolist() for row, prompt in enumerate(prompts)]


def _draw(logits: torch.Tensor, temperature: float, generator: torch.Generator) -> torch.Tensor:
    if temperature == 0:
        return logits.argmax(dim=-1)
    return torch.multinomial((logits / temperature).softmax(dim=-1), 1, generator=generator).squeeze(1)
