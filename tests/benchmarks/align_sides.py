"""The sides of `align_sft` and `align_grpo`: one trainer in a process of its own, which takes turns.

    python tests/benchmarks/align_sides.py SIDE FOLDER STEPS

As `throughput_sides.py`. Peers run in `.venv-bench`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from throughput_sides import FOREVER, Turns

Plan = dict[str, Any]


def ours(folder: Path, plan: Plan, turns: Turns, lora: bool = False) -> None:
    """Our fine-tuning as a worker runs it, on packed pairs."""
    from modelyard.models.export import load_model
    from modelyard.models.options import AdapterOptions, LoraOptions
    from modelyard.train.loop import Job, fit
    from modelyard.train.objective import completion_lm
    from modelyard.train.optimizer import make_optimizer
    from modelyard.train.options import TrainOptions
    from modelyard.train.pairs import Encoded, PackedPairs
    from modelyard.train.programs import adapted
    from modelyard.train.world import World

    documents = [
        Encoded(np.asarray(d["input_ids"], np.int32), np.asarray(d["completion_mask"], bool)) for d in plan["documents"]
    ]
    data = PackedPairs.pack(documents, plan["length"], 0, 1)
    turns.more["filled"] = data.filled
    options = TrainOptions(
        steps=FOREVER, global_batch=plan["batch"], micro_batch=plan["batch"], learning_rate=1e-4, weight_decay=0.0
    )
    adapter = AdapterOptions(lora=LoraOptions(r=plan["r"], alpha=2 * plan["r"]) if lora else None)
    strategy = adapted(load_model(folder / "model"), adapter, options, World(0, 1, torch.device("cpu")))
    optimizer = make_optimizer(strategy.model, options)
    turns.start()
    job = Job(
        strategy.model, optimizer, completion_lm, data, plan["length"], options, sink=lambda _: turns.step(),
        strategy=strategy,
    )  # fmt: skip
    fit(job, strategy.world)


def stops(turns: Turns, seen: Callable[[Any], None] = lambda _: None) -> Any:
    """A transformers callback that takes turns."""
    from transformers import TrainerCallback

    class Stops(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            turns.start()

        def on_step_end(self, arguments: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen(state)
            turns.step()

    return Stops()


def common(folder: Path, plan: Plan) -> dict[str, Any]:
    """Arguments of all transformers trainers."""
    return {
        "output_dir": str(folder / "out"), "max_steps": FOREVER, "use_cpu": True, "learning_rate": 1e-4,
        "max_grad_norm": 1.0, "lr_scheduler_type": "cosine", "optim": "adamw_torch_fused", "report_to": [],
        "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "bf16": False,
        "gradient_checkpointing": False, "per_device_train_batch_size": plan["batch"],
    }  # fmt: skip


def load(folder: Path, plan: Plan, lora: bool = False) -> Any:
    """The model, with PEFT's adapter where asked."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32, attn_implementation="sdpa")
    if not lora:
        return model
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=plan["r"], lora_alpha=2 * plan["r"], target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, settings)


def trl_sft(folder: Path, plan: Plan, turns: Turns) -> None:
    """`trl.SFTTrainer` with its own packing, learning completions only."""
    import trl
    from datasets import Dataset
    from transformers import AutoTokenizer

    data = Dataset.from_list([{k: d[k] for k in ("input_ids", "completion_mask")} for d in plan["documents"]])
    arguments = trl.SFTConfig(
        **common(folder, plan), packing=True, max_length=plan["length"], completion_only_loss=True
    )  # fmt: skip
    words = AutoTokenizer.from_pretrained(folder / "model")
    trainer = trl.SFTTrainer(load(folder, plan), arguments, train_dataset=data, processing_class=words,
                             callbacks=[stops(turns)])  # fmt: skip
    rows = [sum(row) for row in trainer.train_dataset["seq_lengths"]]
    turns.more["filled"] = sum(rows) / (len(rows) * plan["length"])
    trainer.train()


def hf_trainer_lora(folder: Path, plan: Plan, turns: Turns) -> None:
    """`transformers.Trainer` with PEFT on rows packed as ours are, positions and labels included."""
    from transformers import Trainer, TrainingArguments

    rows = np.load(folder / "rows.npz")
    data = [{n: torch.from_numpy(rows[n][i]) for n in ("input_ids", "position_ids", "labels")}
            for i in range(len(rows["labels"]))]  # fmt: skip
    turns.more["filled"] = float(rows["filled"])
    arguments = TrainingArguments(**common(folder, plan))
    Trainer(model=load(folder, plan, lora=True), args=arguments, train_dataset=data, callbacks=[stops(turns)]).train()  # type: ignore[arg-type]


def ours_grpo(folder: Path, plan: Plan, turns: Turns) -> None:
    """Our reinforcement learning as a worker runs it, with its engine."""
    from modelyard.align.options import RolloutEngine, RolloutOptions
    from modelyard.align.reinforce import ReinforceJob, reinforce
    from modelyard.align.reward_options import VerifierOptions
    from modelyard.models.options import AdapterOptions
    from modelyard.train.hooks import Hooks
    from modelyard.train.options import TrainOptions
    from modelyard.train.world import World

    class Begins(Hooks):
        def begin(self, step: int, steps: int) -> None:
            if step == 0:
                turns.start()

    def step(metrics: Any) -> None:
        figures = dict(metrics.extra)
        turns.more.update(reward=figures["reward"], tokens=figures["answer_tokens"])
        turns.step()

    rows = [{"ids": p, "text": "", "row": {}, "place": ""} for p in plan["prompts"]]
    (folder / "data").mkdir(exist_ok=True)
    (folder / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = TrainOptions(
        steps=FOREVER, global_batch=plan["batch"], micro_batch=plan["micro"], learning_rate=plan["rate"],
        weight_decay=0.0,
    )  # fmt: skip
    rollouts = RolloutOptions(
        group=plan["group"], max_tokens=plan["answer"], rows=plan["rows"],
        rewards=(VerifierOptions(kind="regex", pattern=plan["pattern"]),),
    )  # fmt: skip
    job = ReinforceJob(
        model=str(folder / "model"), data=str(folder / "data"), output=str(folder / "out"), train=options,
        adapter=AdapterOptions(lora=None), rollouts=rollouts,
        engine=RolloutEngine(max_sequences=plan["batch"] * plan["group"]),
    )  # fmt: skip
    reinforce(job, World(0, 1, torch.device("cpu")), step, hooks=Begins())


def trl_grpo(folder: Path, plan: Plan, turns: Turns) -> None:
    """`trl.GRPOTrainer`, which generates with transformers."""
    import trl
    from datasets import Dataset
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(folder / "model")
    trainer: Any = None

    def reward(completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        values = [float(re.search(plan["pattern"], text) is not None) for text in completions]
        turns.more.update(reward=sum(values) / len(values), tokens=sum(map(len, completion_ids)) / len(values))
        return values

    settings = common(folder, plan) | {"per_device_train_batch_size": plan["batch"] * plan["group"]}
    arguments = trl.GRPOConfig(
        **settings | {"learning_rate": plan["rate"]}, num_generations=plan["group"],
        max_completion_length=plan["answer"], temperature=1.0, beta=0.0, loss_type="grpo",
    )  # fmt: skip
    data = Dataset.from_list([{"prompt": words.decode(p)} for p in plan["prompts"]])
    trainer = trl.GRPOTrainer(load(folder, plan), reward_funcs=reward, args=arguments, train_dataset=data,
                              processing_class=words, callbacks=[stops(turns)])  # fmt: skip
    trainer.train()


SIDES: dict[str, Callable[[Path, Plan, Turns], None]] = {
    "ours": ours,
    "trl": trl_sft,
    "ours_lora": lambda folder, plan, turns: ours(folder, plan, turns, lora=True),
    "hf_trainer_lora": hf_trainer_lora,
    "ours_grpo": ours_grpo,
    "trl_grpo": trl_grpo,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    place = Path(sys.argv[2])
    SIDES[sys.argv[1]](place, json.loads((place / "plan.json").read_text()), Turns(int(sys.argv[3])))
