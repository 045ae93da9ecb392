"""Reinforcement learning end to end: answers learnt from a CPU-second against TRL's GRPOTrainer.

    python tests/benchmarks/align_grpo.py

Both train the same Llama of 15 M on the same prompts: 4 of them a step, 8 answers each, at most 96 tokens, temperature
1, no KL term, one update, AdamW, fp32, one thread, in processes that take turns. A channel of the model's residual
stream is constant and feeds the end token alone, so that an answer ends with probability 1/32 a token: lengths are
geometric, as the random weights' would not be. The reward is a pattern found in the text. The learning rate is next to
nothing, so that lengths stay what they are on both sides. TRL generates with transformers, as without vLLM.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from align_sft import words
from contract import report
from train_throughput import PEERS, take_turns
from transformers import LlamaConfig, LlamaForCausalLM

from modelyard.models.presets import PRESETS

MODEL, VOCABULARY, PROMPT, ANSWER, BATCH, GROUP, END = "llama-15m", 8192, 64, 96, 4, 8, 2
MEAN, STEPS, ROUNDS, TARGET = 32, 1, 5, 2.0


def prepare(folder: Path) -> None:
    """The model whose answers end by themselves, prompts, and the plan."""
    torch.manual_seed(0)
    shape = PRESETS[MODEL].config() | {"vocab_size": VOCABULARY, "tie_word_embeddings": False, "pad_token_id": 1}
    model = LlamaForCausalLM(LlamaConfig(**shape, eos_token_id=END, bos_token_id=3))
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 1.0
        model.lm_head.weight[:, 0] = 0.0
        normed = model.model(torch.arange(3, 67)[None]).last_hidden_state[..., 0].mean()
        model.lm_head.weight[END, 0] = (math.log(VOCABULARY / MEAN)) / normed
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = END, 1
    model.save_pretrained(folder / "model")
    words(folder / "model", VOCABULARY)
    random = np.random.default_rng(0)
    prompts = random.integers(4, VOCABULARY, (256, PROMPT)).tolist()
    plan = {"prompts": prompts, "batch": BATCH, "group": GROUP, "answer": ANSWER, "rows": 512, "micro": 8,
            "pattern": r"w\d*77", "rate": 1e-9}  # fmt: skip
    (folder / "plan.json").write_text(json.dumps(plan))


def main() -> None:
    """Prints the result as one JSON object."""
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name))
        pythons = {"ours_grpo": sys.executable, "trl_grpo": str(PEERS)}
        sides, missing = take_turns(Path(name), pythons, "align_sides.py", STEPS, ROUNDS)
    rate = {s.name: STEPS * BATCH * GROUP / statistics.median(s.cpu[1:]) for s in sides}
    report(
        "align_grpo",
        unit="samples/CPU s",
        ours=rate["ours_grpo"],
        peer=rate.get("trl_grpo", 0.0),
        peer_name="TRL GRPOTrainer",
        target=TARGET,
        reward={s.name: s.last["reward"] for s in sides},
        answer_tokens={s.name: s.last["tokens"] for s in sides},
        peak_mib={s.name: s.peak_mib for s in sides},
        missing=missing,
    )


if __name__ == "__main__":
    main()
