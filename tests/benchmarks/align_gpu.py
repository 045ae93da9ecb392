"""Reinforcement learning on one GPU: seconds a step by phase, and how far engine and trainer are apart.

    python tests/benchmarks/align_gpu.py [--steps 8]

GRPO of a Llama of the shape of SmolLM2-135M (random weights whose answers end by themselves, as in `align_grpo`): 8
prompts of 64 tokens a step, 16 answers each of at most 256 tokens, full training, the engine on the same GPU. Once with
everything in fp32, where the log-probabilities of engine and trainer must agree within 1e-4, and once in bf16.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contract import report, say
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from modelyard.align.options import RolloutEngine, RolloutOptions
from modelyard.align.reinforce import ReinforceJob, reinforce
from modelyard.align.reward_options import VerifierOptions
from modelyard.models.options import AdapterOptions
from modelyard.train.options import TrainOptions
from modelyard.train.world import World

SHAPE = {"vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
         "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 2048}  # fmt: skip
PROMPT, ANSWER, MEAN, BATCH, GROUP, END, WARM = 64, 256, 100, 8, 16, 2, 2
PHASES = ("sync", "generate", "reward", "score")


def prepare(folder: Path) -> None:
    """A model that ends an answer with probability 1 / MEAN a token, its tokenizer, and prompts."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, eos_token_id=END, bos_token_id=3, pad_token_id=1))
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 1.0
        model.lm_head.weight[:, 0] = 0.0
        normed = model.model(torch.arange(3, 67)[None]).last_hidden_state[..., 0].mean()
        model.lm_head.weight[END, 0] = math.log(SHAPE["vocab_size"] / MEAN) / normed
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = END, 1
    model.save_pretrained(folder / "model")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(SHAPE["vocab_size"])}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(folder / "model" / "tokenizer.json"))
    names = {"eos_token": f"w{END}", "pad_token": "w1", "bos_token": "w3", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "model" / "tokenizer_config.json").write_text(json.dumps(names))
    random = np.random.default_rng(0)
    rows = [{"ids": random.integers(4, SHAPE["vocab_size"], PROMPT).tolist(), "text": "", "row": {}, "place": ""}
            for _ in range(256)]  # fmt: skip
    (folder / "data").mkdir()
    (folder / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def steps_of(folder: Path, precision: str, steps: int, device: torch.device) -> list[dict[str, float]]:
    """What every step reported."""
    found: list[dict[str, float]] = []

    def sink(metrics: Any) -> None:
        found.append({"seconds": metrics.seconds, **metrics.extra})

    job = ReinforceJob(
        model=str(folder / "model"), data=str(folder / "data"), output=str(folder / f"out-{precision}"),
        train=TrainOptions(steps=steps, global_batch=BATCH, micro_batch=16, learning_rate=1e-9, weight_decay=0.0,
                           precision=precision),
        adapter=AdapterOptions(lora=None),
        rollouts=RolloutOptions(group=GROUP, max_tokens=ANSWER, rows=1024,
                                rewards=(VerifierOptions(kind="regex", pattern=r"w\d*77"),)),
        engine=RolloutEngine(device="cuda", max_sequences=BATCH * GROUP,
                             precision="float32" if precision == "fp32" else "bfloat16"),
    )  # fmt: skip
    reinforce(job, World(0, 1, device), sink)
    return found


def main() -> None:
    """Prints the result as one JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("align_gpu needs a CUDA GPU")
    sides: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name))
        for precision in ("fp32", "bf16"):
            counted = steps_of(Path(name), precision, args.steps, torch.device("cuda", 0))[WARM:]
            median = {k: statistics.median(row[k] for row in counted) for k in counted[0]}
            phases = {p: median[f"{p}_seconds"] for p in PHASES if f"{p}_seconds" in median}
            phases["train"] = median["seconds"] - sum(phases.values())
            sides[precision] = {
                "step_s": median["seconds"],
                "answers_per_s": BATCH * GROUP / median["seconds"],
                "answer_tokens": median["answer_tokens"],
                "share": {p: s / median["seconds"] for p, s in phases.items()},
                "engine_difference_max": max(row["engine_difference_max"] for row in counted),
            }
            say(f"{precision}: {sides[precision]}")
    report(
        "align_gpu",
        unit="log-probability",
        ours=sides["fp32"]["engine_difference_max"],
        peer=1e-4,
        peer_name="difference allowed in fp32",
        target=1.0,
        better="less",
        sides=sides,
        device=torch.cuda.get_device_name(),
        torch=torch.__version__,
    )


if __name__ == "__main__":
    main()
