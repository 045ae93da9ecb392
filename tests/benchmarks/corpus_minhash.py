"""MinHash signatures from raw text: our kernel over Arrow buffers against rensa and datatrove, one core.

    python tests/benchmarks/corpus_minhash.py

Both make 112 permutations of word 5-grams. rensa gets its shingles from Python, as its own examples do;
datatrove runs its whole signature step with its English tokenizer on about 60 of the documents. The
target is a ratio to rensa; megabytes of UTF-8 a CPU second are in the fields.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
from contract import clock, in_turns, peak_memory, report, run_peer, say, text_files

from modelyard.corpus import dedup
from modelyard.corpus.arrow import buffers
from modelyard.corpus.dedup_options import MinHashOptions
from modelyard.corpus.kernels import minhash
from modelyard.corpus.read.streams import lines

BYTES = 16_000_000
RENSA = """
import json, sys, time
from rensa import RMinHash
texts = json.load(open(sys.argv[1]))
def once():
    for text in texts:
        words = text.lower().split()
        sketch = RMinHash(num_perm=112, seed=1)
        sketch.update([" ".join(words[i:i + 5]) for i in range(max(len(words) - 4, 1))])
        sketch.digest()
once()
start = time.process_time()
once()
print(json.dumps({"cpu": time.process_time() - start}))
"""
DATATROVE = """
import json, sys, time
from datatrove.data import Document
from datatrove.pipeline.dedup import MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig
texts = json.load(open(sys.argv[1]))
step = MinhashDedupSignature("/tmp/unused", config=MinhashConfig(n_grams=5, num_buckets=14, hashes_per_bucket=8))
def once(some):
    for text in some:
        shingles = step.get_shingles(text)
        if shingles.size:
            step.get_signature(shingles)
once(texts[:3])
start = time.process_time()
once(texts)
print(json.dumps({"cpu": time.process_time() - start}))
"""


def documents(most: int = BYTES) -> list[str]:
    """Texts of the benchmark data: JSON lines where MODELYARD_BENCH_DATA has some, else text files."""
    folder = os.environ.get("MODELYARD_BENCH_DATA")
    packed = sorted(Path(folder).rglob("*.jsonl.zst")) if folder else []
    if not packed:
        texts = [path.read_bytes().decode("utf-8", "ignore") for path in text_files(most)]
        return [text for text in texts if text.strip()]
    chosen, total = [], 0
    for path in packed:
        for _, line in lines(str(path), 0, None, most):
            text = json.loads(line or b"{}").get("text", "")
            if text.strip() and total + len(text.encode()) <= most:
                chosen.append(text)
                total += len(text.encode())
    return chosen


def signatures(column: Any, options: MinHashOptions) -> Any:
    """One pass of ours: signatures and band keys."""
    data, offsets = buffers(column)
    values, _ = minhash.signatures(data, offsets, 5, False, minhash.FOLD, *dedup.permutations(options))
    return minhash.band_keys(values, *options.bands)


def peer_rate(program: str, texts: list[str]) -> float:
    """MB a CPU second of a peer on `texts`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "texts.json"
        path.write_text(json.dumps(texts))
        spent = run_peer(program, str(path))["cpu"]
    return sum(len(text.encode()) for text in texts) / 1e6 / float(spent)


def main() -> None:
    """Measures and prints the result line."""
    texts = documents()
    column, options = pa.array(texts), MinHashOptions()
    size = sum(len(text.encode()) for text in texts) / 1e6
    say(f"{len(texts):,} documents, {size:.1f} MB")
    with clock() as cold:
        signatures(column.slice(0, 1), options)
    say(f"compiled or loaded in {cold.wall:.1f} s")
    with peak_memory() as peak:
        ours = in_turns({"ours": lambda: [signatures(column, options) for _ in range(4)]}, repeats=5)["ours"]
    rates = [peer_rate(RENSA, texts) for _ in range(3)]
    say(f"rensa {rates}")
    datatrove = peer_rate(DATATROVE, texts[:: max(len(texts) // 60, 1)])
    report(
        "corpus_minhash", unit="MB/CPU s", ours=4 * size / ours.cpu_median, peer=sorted(rates)[1],
        peer_name="rensa 0.5.0 RMinHash on Python shingles", target=5.0, peak_mib=peak.mib,
        datatrove=datatrove, ratio_datatrove=4 * size / ours.cpu_median / datatrove,
    )  # fmt: skip


if __name__ == "__main__":
    main()
