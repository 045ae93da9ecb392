"""Time to the first token behind a shared prompt of 512 tokens: native engine with a warm prefix cache against cold.

    python tests/benchmarks/engine_prefix.py [--repeats 5]

One random Llama of 32 M parameters in float32, one thread. Each request is the shared prompt and 16 tokens of its own.
The peer is the same engine computing the whole prompt; beside it, transformers with a copied key/value cache.
"""

from __future__ import annotations

import argparse
import copy
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from contract import in_turns, report, say
from engine_throughput import SHAPE, load, save_model
from transformers import DynamicCache, LlamaForCausalLM

from modelyard.engine import EngineCore, EngineOptions, Request, Sampling, generate

SHARED, OWN = 512, 16
ONE = Sampling(max_tokens=1, temperature=0.0, ignore_eos=True)


class Prompts:
    """Prompts that begin alike, or all differently, and never repeat."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(5)
        self.shared = self._random(SHARED)

    def _random(self, count: int) -> list[int]:
        return torch.randint(5, SHAPE["vocab_size"], (count,), generator=self._generator).tolist()

    def warm(self) -> list[int]:
        """The shared beginning and an ending of its own."""
        return self.shared + self._random(OWN)

    def cold(self) -> list[int]:
        """As long, and never seen."""
        return self._random(SHARED + OWN)


def first_token(core: EngineCore, prompt: Callable[[], list[int]]) -> int:
    """One request of one token."""
    return generate(core, [Request("a", tuple(prompt()), ONE, detokenize=False)])[0].output.tokens[0]


@torch.inference_mode()
def transformers_first_token(model: LlamaForCausalLM, cache: Any, prompt: Callable[[], list[int]]) -> int:
    """One forward pass over what a copied cache does not hold."""
    ids = torch.tensor([prompt()])
    held = 0 if cache is None else SHARED
    kept = DynamicCache() if cache is None else copy.deepcopy(cache)
    out = model(ids[:, held:], past_key_values=kept, logits_to_keep=1)
    return int(out.logits[0, -1].argmax())


def main() -> None:
    """Measures and reports."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    prompts = Prompts()
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder))
        core = EngineCore(folder, EngineOptions(max_sequences=4, threads=1, max_length=1024, precision="float32"))
        model = load(Path(folder))
    with torch.inference_mode():
        cache = model(torch.tensor([prompts.shared]), past_key_values=DynamicCache(), logits_to_keep=1).past_key_values
    probe = prompts.warm()
    first_token(core, prompts.warm)
    same = first_token(core, lambda: probe) == transformers_first_token(model, None, lambda: probe)
    runs = in_turns(
        {
            "warm": functools.partial(first_token, core, prompts.warm),
            "cold": functools.partial(first_token, core, prompts.cold),
            "transformers warm": functools.partial(transformers_first_token, model, cache, prompts.warm),
            "transformers cold": functools.partial(transformers_first_token, model, None, prompts.cold),
        },
        repeats=args.repeats,
    )
    ms = {name: run.cpu_median * 1000 for name, run in runs.items()}
    say(f"{ms}")
    report(
        "engine_prefix",
        unit="CPU ms to the first token",
        ours=ms["warm"],
        peer=ms["cold"],
        peer_name="the same engine, cold",
        target=0.2,
        better="less",
        identical=same,
        ratio_transformers=ms["transformers warm"] / ms["transformers cold"],
        ratio_warm_transformers=ms["warm"] / ms["transformers warm"],
        milliseconds=ms,
    )


if __name__ == "__main__":
    main()
