"""Losses and gradients of alignment on one batch against TRL's trainers, in float32.

    python tests/benchmarks/align_losses.py

A small Llama with random weights, a reference with other weights and a batch of answers of several lengths are made
once. Our objectives see the answers packed, TRL's trainers padded (in `.venv-bench`, `peers/trl_losses.py`); both write
the loss and the gradient of every parameter, which are compared here. `ours` is the greatest difference of a gradient's
entry over the gradient's greatest entry, and of losses over the loss.

TRL's ORPO adds the prompt's cross-entropy, averaged over the batch's tokens: its batch here has prompts of one token
and answers of one length, where both say the same.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contract import report, run_peer, say
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from modelyard.align.objectives import PreferenceObjective, RewardObjective, answers
from modelyard.align.options import PreferenceOptions, RewardOptions, RolloutOptions
from modelyard.align.policy import PolicyObjective
from modelyard.align.reward_model import load_classifier
from modelyard.align.samples import Drawn, Prompt, Sample, pack
from modelyard.models.export import load_model
from modelyard.train.objective import completion_lm
from modelyard.train.pairs import Encoded, PackedPairs

HERE = Path(__file__).resolve().parent
VOCABULARY, PAIRS, LONGEST, BETA, TARGET = 256, 6, 14, 0.1, 1e-5
METHODS = ("sft", "dpo", "ipo", "kto", "orpo", "reward", "grpo", "grpo_unbiased_kl", "dr_grpo", "dapo", "rloo")


def prepare(folder: Path) -> dict[str, Any]:
    """Models, tokenizer and the batch as token ids."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w1", eos_token="w2")
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, pad_token_id=1, eos_token_id=2, initializer_range=0.15,
    )  # fmt: skip
    torch.manual_seed(0)
    for name in ("model", "reference"):
        LlamaForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    config.num_labels = 1
    LlamaForSequenceClassification(config).save_pretrained(folder / "classifier")
    tokenizer.save_pretrained(folder / "classifier")
    random = np.random.default_rng(0)

    def text(least: int, most: int) -> list[int]:
        return [int(t) for t in random.integers(3, VOCABULARY, random.integers(least, most + 1))]

    pairs = [{"prompt": text(2, 9), "chosen": text(2, LONGEST), "rejected": text(2, LONGEST), "label": i % 2 == 0,
              "margin": round(float(random.random()), 3)} for i in range(PAIRS)]  # fmt: skip
    even = [{"prompt": text(1, 1), "chosen": text(7, 7), "rejected": text(2, LONGEST)} for _ in range(PAIRS)]
    drawn = [{"prompt": p["prompt"], "tokens": p["chosen"], "advantage": float(random.normal()),
              "old": [float(v) for v in random.normal(-7, 1, len(p["chosen"]))],
              "reference": [float(v) for v in random.normal(-7, 1, len(p["chosen"]))]} for p in pairs]  # fmt: skip
    plan = {"pairs": pairs, "even": even, "drawn": drawn, "beta": BETA, "longest": LONGEST, "methods": METHODS}
    (folder / "plan.json").write_text(json.dumps(plan))
    return plan


def packed(groups: list[list[tuple[list[int], list[int]]]], values: dict[str, Any] | None = None) -> Any:
    """Documents (prompt, answer) in groups that stay together, as one batch of tensors."""
    made = [
        [Encoded(np.asarray(p + a, np.int32), np.asarray([False] * len(p) + [True] * len(a))) for p, a in group]
        for group in groups
    ]
    rows = PackedPairs.pack_groups(made, 2 * (LONGEST + 9) + 20, 0, 1, values)
    return {name: torch.from_numpy(array) for name, array in rows.batch(np.arange(len(rows))).items()}


def both_sides(pairs: list[dict[str, Any]]) -> Any:
    """Chosen and rejected answers, with labels and margins where there are any."""
    values = {
        name: np.asarray([[p[name]] * 2 for p in pairs], np.float32) for name in ("margin", "label") if name in pairs[0]
    }
    return packed([[(p["prompt"], p["chosen"]), (p["prompt"], p["rejected"])] for p in pairs], values)


def mismatched(pairs: list[dict[str, Any]]) -> Any:
    """KTO's: every answer beside that of the pair before to its own prompt."""
    labels = {"label": np.asarray([[p["label"]] * 2 for p in pairs], np.float32)}
    groups = [[(p["prompt"], p["chosen"]), (p["prompt"], pairs[i - 1]["chosen"])] for i, p in enumerate(pairs)]
    return packed(groups, labels)


def policy_batch(plan: dict[str, Any], options: RolloutOptions) -> Any:
    """Drawn answers with what their log-probabilities were."""
    samples = [Sample(Prompt(tuple(d["prompt"]), "", {}, ""), Drawn(tuple(d["tokens"]), tuple(d["old"]), "", True, 0))
               for d in plan["drawn"]]  # fmt: skip
    gains = np.asarray([d["advantage"] for d in plan["drawn"]])
    references = [d["reference"] for d in plan["drawn"]]
    batch = {n: torch.from_numpy(a) for n, a in pack(samples, gains, options, 1, references).items()}
    return batch | {"old": batch["engine"]}


def ours(folder: Path, plan: dict[str, Any], method: str) -> dict[str, np.ndarray]:
    """Loss and gradients by our objective."""
    model: Any = load_classifier(folder / "classifier") if method == "reward" else load_model(folder / "model")
    objective: Any
    if method == "sft":
        objective, batch = completion_lm, packed([[(p["prompt"], p["chosen"])] for p in plan["pairs"]])
    elif method == "reward":
        objective, batch = RewardObjective(RewardOptions()), both_sides(plan["pairs"])
    elif method in METHODS[METHODS.index("grpo") :]:
        variant, _, unbiased = method.partition("_unbiased")
        options = RolloutOptions(variant=variant, kl=0.0 if method == "rloo" else BETA, updates=2, rows=64,
                                 max_tokens=LONGEST, unbiased_kl=bool(unbiased))  # fmt: skip
        objective, batch = PolicyObjective(options, LONGEST), policy_batch(plan, options)
    else:
        objective = PreferenceObjective(method, PreferenceOptions(beta=BETA))
        batch = (
            mismatched(plan["pairs"]) if method == "kto" else both_sides(plan["even" if method == "orpo" else "pairs"])
        )
        with torch.no_grad():
            batch["reference"] = answers(load_model(folder / "reference"), batch).logprobs
    loss, metrics = objective(model, batch)
    loss = loss / metrics["weight"]
    loss.backward()
    found = {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": np.asarray(loss.item()), **found}


def difference(one: dict[str, np.ndarray], other: Any) -> tuple[float, float]:
    """Relative differences of the loss and of the gradient.

    Raises:
        ValueError: the sides have gradients of other parameters.
    """
    if set(one) != set(other):
        raise ValueError(f"gradients of other parameters: {sorted(set(one) ^ set(other))[:3]}")
    scale = max(float(np.abs(other[n]).max()) for n in other if n != "loss")
    worst = max(float(np.abs(one[n] - other[n]).max()) for n in other if n != "loss")
    return abs(float(one["loss"]) - float(other["loss"])) / abs(float(other["loss"])), worst / scale


def main() -> None:
    """Prints a table to stderr and the result as one JSON object."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plan = prepare(folder)
        version = run_peer(HERE / "peers" / "trl_losses.py", str(folder))["version"]
        say(f"{'method':8} {'loss':>12} {'TRL':>12} {'loss diff.':>12} {'gradient diff.':>14}")
        found = {}
        for method in METHODS:
            mine, theirs = ours(folder, plan, method), dict(np.load(folder / f"{method}.npz"))
            found[method] = difference(mine, theirs)
            say(f"{method:8} {float(mine['loss']):12.6f} {float(theirs['loss']):12.6f} "
                f"{found[method][0]:12.1e} {found[method][1]:14.1e}")  # fmt: skip
    report(
        "align_losses",
        unit="greatest relative difference",
        ours=max(max(pair) for pair in found.values()),
        peer=1.0,
        peer_name=f"TRL {version}",
        target=TARGET,
        better="less",
        max_difference=max(max(pair) for pair in found.values()),
        by_method={name: list(pair) for name, pair in found.items()},
    )


if __name__ == "__main__":
    sys.exit(main())
