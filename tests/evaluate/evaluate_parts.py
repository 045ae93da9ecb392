"""Parts for evaluation tests: sentences, token folders, and tiny models with random or memorized weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from modelyard.tokens import TokenWriter
from modelyard.tokens.pack import Buckets, encode_table, pack_table
from modelyard.tokens.tokenizer import Encoder, save_tokenizer, train_tokenizer

LENGTH = 32
WORDS = [
    "every",
    "shard",
    "holds",
    "tokens",
    "of",
    "the",
    "corpus",
    "and",
    "a",
    "model",
    "reads",
    "them",
    "in",
    "order",
]


def sentences(n: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(8, 40))) + "." for _ in range(n)]


def write_tokens(folder: Path) -> Path:
    """A tokenize artifact's folder: `tokenizer/` and `heldout/` of 60 documents."""
    save_tokenizer(train_tokenizer(sentences(300, 0), 320), folder / "tokenizer")
    encoder = Encoder.open(folder / "tokenizer")
    texts = sentences(60, 1)
    table = encode_table(pa.table({"id": [str(i) for i in range(60)], "text": texts}), encoder, Buckets(0.5, 1, 1))
    writer = TokenWriter(folder / "heldout", LENGTH, encoder.vocab_size)
    writer.add(pack_table(table.drop_columns("bucket"), LENGTH, encoder.pad_id, keep_tail=True))
    writer.close(60, sum(len(t.encode()) for t in texts))
    return folder


def make_model(tokens: Path, folder: Path, seed: int = 0, **changes: int) -> LlamaForCausalLM:
    """Saves a tiny Llama with random weights and the tokenizer beside it."""
    encoder = Encoder.open(tokens / "tokenizer")
    settings = {
        "vocab_size": encoder.vocab_size, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    } | changes  # fmt: skip
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**settings, eos_token_id=encoder.end_id, bos_token_id=encoder.end_id))
    save(model, tokens, folder)
    return model


def save(model: LlamaForCausalLM, tokens: Path, folder: Path) -> None:
    model.save_pretrained(str(folder))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tokens / "tokenizer" / name).read_bytes())


def memorize(model: LlamaForCausalLM, texts: Sequence[str], tokens: Path, steps: int = 150) -> None:
    """Trains until the model knows the texts by heart."""
    encoder = Encoder.open(tokens / "tokenizer")
    rows = [torch.tensor([encoder.tokenizer.encode(text).ids]) for text in texts]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        loss = sum(model(input_ids=row, labels=row).loss for row in rows)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[union-attr]
        optimizer.step()
