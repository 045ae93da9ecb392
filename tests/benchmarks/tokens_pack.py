"""Tokens a CPU-second of tokenizing and packing, against the usual transformers loop and the tokenizer's own limit.

    python tests/benchmarks/tokens_pack.py [--megabytes 8] [--repeats 3]

All sides use one byte-level BPE of 8,192 entries, one thread, the same documents, sequences of 256. The
peer is the recipe of transformers' language-modelling examples: a fast tokenizer over batches of 1,000
texts, ids concatenated as Python lists and cut into blocks. The limit is `encode_batch_fast` alone.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from itertools import chain
from pathlib import Path

os.environ |= {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

import numpy as np
import pyarrow as pa
import transformers
from contract import in_turns, report, say, text_files

from modelyard.tokens import TokenWriter
from modelyard.tokens.pack import Buckets, by_bucket, encode_table, pack_table
from modelyard.tokens.tokenizer import Encoder, save_tokenizer, train_tokenizer

LENGTH = 256


def ours(documents: pa.Table, encoder: Encoder, folder: Path) -> int:
    """Encodes, orders, packs and writes shards with boundaries and checksums; returns the tokens."""
    buckets = Buckets(0.02, 1, 1)
    tokens = 0
    for number, part in enumerate(by_bucket(encode_table(documents, encoder, buckets), buckets.total)):
        writer = TokenWriter(folder / str(number), LENGTH, encoder.vocab_size)
        writer.add(pack_table(part, LENGTH, encoder.pad_id, keep_tail=True))
        tokens += writer.close(part.num_rows, 1).tokens
    return tokens


def peer(texts: list[str], tokenizer: transformers.PreTrainedTokenizerFast, end: int, file: Path) -> int:
    """Tokenizes batches of texts, concatenates and cuts into blocks, saves one array; returns the tokens."""
    blocks: list[list[int]] = []
    left: list[int] = []
    for first in range(0, len(texts), 1000):
        batch = tokenizer(texts[first : first + 1000], add_special_tokens=False)["input_ids"]
        stream = left + list(chain(*([*ids, end] for ids in batch)))
        whole = len(stream) // LENGTH * LENGTH
        blocks += [stream[i : i + LENGTH] for i in range(0, whole, LENGTH)]
        left = stream[whole:]
    np.save(file, np.array(blocks, dtype=np.uint16))
    return len(blocks) * LENGTH + len(left)


def main() -> None:
    """Measures all sides in turns."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=float, default=8.0)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    texts = [p.read_text(encoding="utf-8", errors="replace") for p in text_files(int(given.megabytes * 1e6))]
    texts = [text for text in texts if text]
    documents = pa.table({"id": [str(i) for i in range(len(texts))], "text": pa.array(texts, pa.large_string())})
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        say(f"{len(texts):,} documents, {sum(map(len, texts)) / 1e6:.1f} M characters; training the tokenizer")
        save_tokenizer(train_tokenizer(texts[::4], 8192), home / "tokenizer")
        encoder = Encoder.open(home / "tokenizer")
        fast = transformers.AutoTokenizer.from_pretrained(str(home / "tokenizer"), local_files_only=True)
        limit = encoder.tokenizer
        runs = in_turns(
            {
                "ours": lambda: ours(documents, encoder, home / "ours"),
                "loop": lambda: peer(texts, fast, encoder.end_id, home / "peer.npy"),
                "limit": lambda: len(limit.encode_batch_fast(texts, add_special_tokens=False)),
            },
            given.repeats,
        )
    tokens = runs["ours"].last
    speed = {name: tokens / side.cpu_median for name, side in runs.items()}
    report(
        "tokens_pack",
        unit="tokens/CPU s",
        ours=speed["ours"],
        peer=speed["loop"],
        peer_name=f"transformers {transformers.__version__} loop",
        target=1.0,
        ratio_limit=speed["ours"] / speed["limit"],
        tokens=tokens,
        peer_tokens=runs["loop"].last,
        megabytes_per_cpu_s=sum(len(t.encode()) for t in texts) / 1e6 / runs["ours"].cpu_median,
    )


if __name__ == "__main__":
    main()
