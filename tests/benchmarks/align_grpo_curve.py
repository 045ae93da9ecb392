"""The reward curve of GRPO against that of TRL's GRPOTrainer: how far apart, and how far seeds are from each other.

    python tests/benchmarks/align_grpo_curve.py

A Llama of random weights learns to write words of a set, a quarter of all: the reward of an answer is the share of its
words that are in it. Both sides train all weights of the same model on the same prompts for the same steps, with AdamW
of the same constants at a constant rate, 8 prompts a step, groups of 8, answers of 16 tokens at most, no KL term, one
update, fp32, one thread; each with several seeds, which decide prompts and draws. The figure is the difference by step
of the two mean curves (root mean square over steps) beside the standard error that the spread between seeds gives it:
a ratio of 2 is a difference of two standard errors. `area` is the mean reward of each run over all steps.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SEEDS, STEPS, BATCH, GROUP, PROMPT, ANSWER, VOCABULARY, RATE, TARGET = (1, 2, 3), 40, 8, 8, 8, 16, 64, 2e-3, 2.0
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False}  # fmt: skip


def share(prompt: str, completion: str, row: Mapping[str, Any]) -> float:
    """The share of an answer's words whose number is a multiple of four."""
    words = completion.split()
    return sum(int(word[1:]) % 4 == 0 for word in words) / len(words) if words else 0.0


def prepare(folder: Path) -> None:
    """The model and the prompts."""
    import numpy as np
    import torch
    from align_sft import words
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, vocab_size=VOCABULARY, pad_token_id=1, eos_token_id=2, bos_token_id=3)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    words(folder / "model", VOCABULARY)
    prompts = np.random.default_rng(0).integers(4, VOCABULARY, (256, PROMPT)).tolist()
    (folder / "prompts.json").write_text(json.dumps(prompts))


def ours(folder: Path, seed: int) -> list[float]:
    """The mean reward by step of our loop, as a worker runs it."""
    import torch

    from modelyard.align.options import RolloutEngine, RolloutOptions
    from modelyard.align.reinforce import ReinforceJob, reinforce
    from modelyard.align.reward_options import VerifierOptions
    from modelyard.models.options import AdapterOptions
    from modelyard.train.options import TrainOptions
    from modelyard.train.world import World

    rows = [{"ids": p, "text": "", "row": {}, "place": ""} for p in json.loads((folder / "prompts.json").read_text())]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = TrainOptions(
        steps=STEPS, global_batch=BATCH, micro_batch=BATCH * GROUP, learning_rate=RATE, schedule="constant", warmup=0,
        betas=(0.9, 0.999), weight_decay=0.0, seed=seed, checkpoint_every=STEPS,
    )  # fmt: skip
    reward = VerifierOptions(kind="function", function=f"{Path(__file__).stem}:share", timeout=60)
    job = ReinforceJob(
        model=str(folder / "model"), data=str(folder), output=str(folder / f"out-{seed}"), train=train,
        adapter=AdapterOptions(lora=None), engine=RolloutEngine(max_sequences=BATCH * GROUP),
        rollouts=RolloutOptions(group=GROUP, max_tokens=ANSWER, rows=64, rewards=(reward,)),
    )  # fmt: skip
    return [row["reward"] for row in reinforce(job, World(0, 1, torch.device("cpu"))).history]


def trl(folder: Path, seed: int) -> list[float]:
    """The same of `trl.GRPOTrainer`, which generates with transformers."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    words = AutoTokenizer.from_pretrained(folder / "model")
    curve: list[float] = []

    def reward(completions: list[str], **_: Any) -> list[float]:
        values = [share("", text, {}) for text in completions]
        curve.append(sum(values) / len(values))
        return values

    arguments = GRPOConfig(
        output_dir=str(folder / f"trl-{seed}"), max_steps=STEPS, use_cpu=True, bf16=False, seed=seed,
        learning_rate=RATE, lr_scheduler_type="constant", optim="adamw_torch", adam_beta1=0.9, adam_beta2=0.999,
        weight_decay=0.0, max_grad_norm=1.0, per_device_train_batch_size=BATCH * GROUP, num_generations=GROUP,
        temperature=1.0, beta=0.0, max_completion_length=ANSWER, loss_type="grpo", gradient_checkpointing=False,
        report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    data = Dataset.from_list([{"prompt": words.decode(p)} for p in json.loads((folder / "prompts.json").read_text())])
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    GRPOTrainer(model, reward_funcs=reward, args=arguments, train_dataset=data, processing_class=words).train()
    return curve


def curves(python: str, side: str, folder: Path) -> list[list[float]]:
    """The curves of one side, [seeds, steps], from a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [python, str(HERE / "align_grpo_curve.py"), side, str(folder)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: list[list[float]] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main() -> None:
    """Prints the result as one JSON object."""
    import numpy as np
    from contract import report, say
    from train_throughput import PEERS

    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name))
        mine, theirs = (
            np.asarray(curves(python, side, Path(name)))
            for python, side in ((sys.executable, "ours"), (str(PEERS), "trl"))
        )
    for step in range(0, STEPS, 7):
        say(f"  step {step + 1}: ours {mine[:, step].round(3)}, TRL {theirs[:, step].round(3)}")
    difference = mine.mean(axis=0) - theirs.mean(axis=0)
    error = ((mine.var(axis=0, ddof=1) + theirs.var(axis=0, ddof=1)) / len(SEEDS)) ** 0.5
    report(
        "align_grpo_curve",
        unit="reward (rms over steps)",
        ours=float((difference**2).mean() ** 0.5),
        peer=float((error**2).mean() ** 0.5),
        peer_name="standard error by the spread between seeds",
        target=TARGET,
        better="less",
        area={"ours": mine.mean(axis=1).round(4).tolist(), "trl": theirs.mean(axis=1).round(4).tolist()},
        curve={"ours": mine.mean(axis=0).round(3).tolist(), "trl": theirs.mean(axis=0).round(3).tolist()},
    )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        side = {"ours": ours, "trl": trl}[sys.argv[1]]
        print(json.dumps([side(Path(sys.argv[2]), seed) for seed in SEEDS]), flush=True)
    else:
        main()
