"""Loss and gradients by TRL's trainers of the batch that `align_losses` made: `python trl_losses.py FOLDER`.

Each trainer is built as its documentation says and asked for the loss of a padded batch made from the same token ids.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

TEXT = {
    "prompt": ["w3 w4"],
    "completion": ["w5"],
    "chosen": ["w5"],
    "rejected": ["w6"],
    "label": [True],
    "text": ["w3 w4"],
}
"""A data set for the constructors; the batches do not come from it."""


def padded(rows: list[list[Any]], value: Any, left: bool = False) -> torch.Tensor:
    """Rows of several lengths as one tensor [n, longest]."""
    width = max(map(len, rows))
    return torch.tensor([[value] * (width - len(r)) + r if left else r + [value] * (width - len(r)) for r in rows])


def completions(prompts: list[list[int]], texts: list[list[int]]) -> dict[str, torch.Tensor]:
    """`input_ids`, `attention_mask` and `completion_mask`, padded on the right."""
    whole = [p + t for p, t in zip(prompts, texts, strict=True)]
    return {
        "input_ids": padded(whole, 1),
        "attention_mask": padded([[1] * len(w) for w in whole], 0),
        "completion_mask": padded([[0] * len(p) + [1] * len(t) for p, t in zip(prompts, texts, strict=True)], 0),
    }


def sides(pairs: list[dict[str, Any]]) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and answers, first all that were chosen, then all that were rejected."""
    return [p["prompt"] for p in pairs] * 2, [p["chosen"] for p in pairs] + [p["rejected"] for p in pairs]


def drawn(plan: dict[str, Any], method: str) -> dict[str, Any]:
    """What GRPO and RLOO learn from."""
    rows = plan["drawn"]
    old = padded([r["old"] for r in rows], 0.0)
    found = {
        "prompt_ids": padded([r["prompt"] for r in rows], 1, left=True),
        "prompt_mask": padded([[1] * len(r["prompt"]) for r in rows], 0, left=True),
        "completion_ids": padded([r["tokens"] for r in rows], 1),
        "completion_mask": padded([[1] * len(r["tokens"]) for r in rows], 0),
        "advantages": torch.tensor([r["advantage"] for r in rows]),
        "num_items_in_batch": torch.tensor(float(sum(len(r["tokens"]) for r in rows))),
    }
    if method == "rloo":
        return found | {"old_logps": old.sum(1)}
    return found | {"old_per_token_logps": old, "ref_per_token_logps": padded([r["reference"] for r in rows], 0.0)}


def trainer_and_batch(folder: Path, plan: dict[str, Any], method: str) -> tuple[Any, dict[str, Any]]:
    """A trainer, and the batch as its collator would make it."""

    def load(name: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)

    words, pairs = AutoTokenizer.from_pretrained(folder / "model"), plan["pairs"]
    common = {"output_dir": str(folder / "out"), "use_cpu": True, "report_to": [], "bf16": False,
              "gradient_checkpointing": False}  # fmt: skip
    data = Dataset.from_dict(TEXT)

    def columns(*names: str) -> Dataset:
        return data.select_columns(list(names))

    if method == "sft":
        batch = completions([p["prompt"] for p in pairs], [p["chosen"] for p in pairs])
        batch["labels"] = batch["input_ids"].masked_fill(batch.pop("completion_mask") == 0, -100)
        made = trl.SFTTrainer(
            load("model"), trl.SFTConfig(**common), train_dataset=columns("text"), processing_class=words
        )
    elif method in ("dpo", "ipo"):
        batch = completions(*sides(pairs))
        arguments = trl.DPOConfig(beta=plan["beta"], loss_type=["sigmoid" if method == "dpo" else "ipo"], **common)
        made = trl.DPOTrainer(load("model"), load("reference"), arguments,
                              train_dataset=columns("prompt", "chosen", "rejected"),
                              processing_class=words)  # fmt: skip
    elif method == "kto":
        prompts, texts = [p["prompt"] for p in pairs], [p["chosen"] for p in pairs]
        other = completions(prompts, [texts[-1], *texts[:-1]])
        batch = completions(prompts, texts) | {f"KL_{name}": value for name, value in other.items()}
        batch["label"] = torch.tensor([p["label"] for p in pairs])
        arguments = trl.KTOConfig(beta=plan["beta"], per_device_train_batch_size=2, **common)
        twice = Dataset.from_dict({n: TEXT[n] * 2 for n in ("prompt", "completion", "label")})
        made = trl.KTOTrainer(load("model"), load("reference"), arguments, train_dataset=twice, processing_class=words)
    elif method == "orpo":
        batch = {}
        for side in ("chosen", "rejected"):
            one = completions([p["prompt"] for p in plan["even"]], [p[side] for p in plan["even"]])
            batch[f"{side}_input_ids"], batch[f"{side}_attention_mask"] = one["input_ids"], one["attention_mask"]
            batch[f"{side}_labels"] = one["input_ids"].masked_fill(one["completion_mask"] == 0, -100)
        arguments = ORPOConfig(beta=plan["beta"], **common)
        made = ORPOTrainer(load("model"), arguments, train_dataset=columns("prompt", "chosen", "rejected"),
                           processing_class=words)  # fmt: skip
    elif method == "reward":
        batch = completions(*sides(pairs))
        batch.pop("completion_mask")
        batch["margin"] = torch.tensor([p["margin"] for p in pairs])
        model = AutoModelForSequenceClassification.from_pretrained(
            folder / "classifier", num_labels=1, dtype=torch.float32
        )
        made = trl.RewardTrainer(model, trl.RewardConfig(**common), train_dataset=columns("chosen", "rejected"),
                                 processing_class=words)  # fmt: skip
    else:
        batch = drawn(plan, method)
        more = {"max_completion_length": plan["longest"], "num_generations": 2, "per_device_train_batch_size": 2}
        config, kind = (trl.RLOOConfig, trl.RLOOTrainer) if method == "rloo" else (trl.GRPOConfig, trl.GRPOTrainer)
        if method != "rloo":
            more |= {"loss_type": method.partition("_unbiased")[0], "use_bias_correction_kl": "unbiased" in method,
                     "num_iterations": 2, "epsilon_high": 0.28 if method == "dapo" else 0.2}  # fmt: skip
        arguments = config(beta=0.0 if method == "rloo" else plan["beta"], **more, **common)
        made = kind(load("model"), reward_funcs=lambda completions, **_: [0.0] * len(completions), args=arguments,
                    train_dataset=columns("prompt"), processing_class=words)  # fmt: skip
        made.current_gradient_accumulation_steps = 1
    return made, batch


def main() -> None:
    """Writes METHOD.npz for every method; prints the version."""
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    plan = json.loads((folder / "plan.json").read_text())
    for method in plan["methods"]:
        trainer, batch = trainer_and_batch(folder, plan, method)
        trainer.model.train()
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        found = {n: p.grad.numpy() for n, p in trainer.model.named_parameters() if p.grad is not None}
        np.savez(folder / f"{method}.npz", loss=loss.item(), **found)
    print(json.dumps({"version": trl.__version__}))


if __name__ == "__main__":
    main()
