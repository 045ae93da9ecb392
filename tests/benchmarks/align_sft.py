"""Supervised fine-tuning, full and with LoRA: tokens a CPU-second and memory against TRL and PEFT under HF Trainer.

    python tests/benchmarks/align_sft.py

All train the same Llama of 15 M (16 k rows of vocabulary) on the same documents, whose second half is learnt, packed
into sequences of 256, batch of 8, AdamW, clipping, fp32, one thread each, in processes that take turns. TRL packs by
itself (best fit, flattened batches); HF Trainer gets our packed rows with positions and labels. Padding does not
count: a side's rate is tokens of documents. Memory is the most a process held above what it held before its first step.
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
from contract import report
from train_throughput import PEERS, take_turns
from transformers import LlamaConfig, LlamaForCausalLM

from modelyard.models.presets import PRESETS
from modelyard.train.objective import first_tokens, next_tokens, positions
from modelyard.train.pairs import Encoded, PackedPairs

MODEL, LENGTH, VOCABULARY, BATCH, RANK = "llama-15m", 256, 16_384, 8, 8
STEPS, ROUNDS, TARGET = 2, 4, 1.2
SIDES = {"ours": sys.executable, "trl": str(PEERS), "ours_lora": sys.executable, "hf_trainer_lora": sys.executable}
HERE = Path(__file__).resolve().parent


def words(folder: Path, size: int) -> None:
    """A tokenizer of numbered words, which the peers' constructors ask for."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    table = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    table.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=table, pad_token="w1", eos_token="w2").save_pretrained(folder)


def prepare(folder: Path) -> None:
    """The model, documents of 20 to 180 tokens, and the same packed."""
    torch.manual_seed(0)
    config = LlamaConfig(**PRESETS[MODEL].config() | {"vocab_size": VOCABULARY, "pad_token_id": 1, "eos_token_id": 2})
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    words(folder / "model", VOCABULARY)
    random = np.random.default_rng(0)
    documents = []
    for length in random.integers(20, 181, 1500):
        ids = random.integers(3, VOCABULARY, length)
        documents.append({"input_ids": ids.tolist(), "completion_mask": [int(i >= length // 2) for i in range(length)]})
    encoded = [Encoded(np.asarray(d["input_ids"], np.int32), np.asarray(d["completion_mask"], bool)) for d in documents]
    packed = PackedPairs.pack(encoded, LENGTH, 0, 1)
    batch = {n: torch.from_numpy(a) for n, a in packed.batch(np.arange(len(packed))).items()}
    # transformers shifts labels itself: a first token of a document must not be one.
    labels = batch["input_ids"].masked_fill(~batch["loss_mask"] | first_tokens(batch["document_ids"]), -100)
    assert torch.equal(next_tokens(batch["input_ids"], labels != -100)[:, :-1], labels[:, 1:])
    np.savez(folder / "rows.npz", input_ids=batch["input_ids"], labels=labels, filled=packed.filled,
             position_ids=positions(batch["document_ids"]))  # fmt: skip
    plan = {"documents": documents, "length": LENGTH, "batch": BATCH, "r": RANK}
    (folder / "plan.json").write_text(json.dumps(plan))


def main() -> None:
    """Prints the result as one JSON object."""
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name))
        sides, missing = take_turns(Path(name), SIDES, "align_sides.py", STEPS, ROUNDS)
    filled = {side.name: side.last["filled"] for side in sides}
    rate = {s.name: STEPS * BATCH * LENGTH * filled[s.name] / statistics.median(s.cpu[1:]) for s in sides}
    peak = {side.name: side.peak_mib for side in sides}
    report(
        "align_sft",
        unit="tokens/CPU s",
        ours=rate["ours"],
        peer=rate.get("trl", 0.0),
        peer_name="TRL SFTTrainer",
        target=TARGET,
        ratio_lora=rate["ours_lora"] / rate["hf_trainer_lora"] if "hf_trainer_lora" in rate else None,
        tokens_per_cpu_s=rate,
        peak_mib=peak,
        lowest_memory=peak["ours"] <= peak.get("trl", math.inf)
        and peak["ours_lora"] <= peak.get("hf_trainer_lora", math.inf),
        filled=filled,
        missing=missing,
    )  # fmt: skip


if __name__ == "__main__":
    main()
