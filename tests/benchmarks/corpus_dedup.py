"""Fuzzy deduplication end to end on Ray: read, keys, buckets, verification, filter, write.

    python tests/benchmarks/corpus_dedup.py

The text is written as JSONL in several files; ours is the curate stage with one MinHash step and one worker,
in CPU seconds of the whole process tree (Ray's own processes included) and without its start. The peer is
datatrove's signature step alone, the first of its four, on some of the documents. `kernels` is the share of
our time that the same work takes without Ray and files, `over_shuffle` the rate when everything goes over Ray
Data's shuffle.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
from contract import clock, in_turns, peak_memory, report, say
from corpus_minhash import DATATROVE, documents, peer_rate

from modelyard.corpus import dedup
from modelyard.corpus.dedup_options import MinHashOptions
from modelyard.recipe import Resources
from modelyard.stages import session
from modelyard.stages.base import StageContext
from modelyard.stages.curate import CurateOptions, CurateStage
from modelyard.stages.progress import Display, Progress
from modelyard.storage import FileRef, Files, remove

BYTES = 256_000_000


class _NoTracking:
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Nothing is tracked here."""

    def log_text(self, name: str, text: str) -> None:
        """Nothing is kept here."""


def write_input(folder: Path, texts: list[str], size: int = BYTES) -> Files:
    """The texts as eight JSONL files, repeated with small edits until `size` bytes are reached."""
    rows, total, turn = [], 0, 0
    while total < size:
        for n, text in enumerate(texts):
            # Repeats differ in their words, so that they are documents of their own and not near-copies.
            changed = (
                text if turn == 0 else " ".join(f"{w}{turn if k % 3 == 0 else ''}" for k, w in enumerate(text.split()))
            )
            rows.append(json.dumps({"text": changed, "n": n}, ensure_ascii=False))
            total += len(rows[-1].encode())
        turn += 1
    refs = []
    for number in range(8):
        path = folder / f"in-{number}.jsonl"
        path.write_text("\n".join(rows[number::8]))
        refs.append(FileRef(str(path), path.stat().st_size, hashlib.md5(path.read_bytes()).hexdigest()))
    return Files(tuple(refs), "bench")


def curate(files: Files, folder: Path, limit: int) -> Any:
    """Runs the stage afresh."""
    remove(str(folder))
    step = {"dedup": {"method": "minhash"}}
    options = CurateOptions(
        kind="curate", steps=(step,), shuffle_above=limit, resources=Resources(workers=1)  # type: ignore[arg-type]
    )  # fmt: skip
    with Display(interval=600) as display:
        ctx: Any = StageContext(
            name="corpus", recipe="bench", options=options, fingerprint="0" * 64, root=str(folder),
            inputs={"files": files}, output=f"{folder}/out", work=f"{folder}/work",
            run=_NoTracking(), progress=Progress(display, "corpus"),  # type: ignore[arg-type]
        )  # fmt: skip
        return CurateStage().run(ctx)


def kernels(texts: list[str]) -> float:
    """CPU seconds of keys, candidates and verification on the texts, without Ray, files or JSON."""
    table, options = pa.table({"id": [str(n) for n in range(len(texts))], "text": texts}), MinHashOptions()
    with clock() as spent:
        found = dedup.candidates(dedup.keys(table, dedup.address(0, len(texts)), options))
        dedup.decide(found, table["text"].take(found["doc"]), options)
    return spent.cpu


def main() -> None:
    """Measures and prints the result line."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = write_input(folder, documents(8_000_000))
        texts = [json.loads(line)["text"] for ref in files.refs for line in Path(ref.uri).read_text().split("\n")]
        size = sum(len(text.encode()) for text in texts) / 1e6
        session.start(2)
        try:
            sides = {
                "ours": lambda: curate(files, folder / "local", 2**40),
                "shuffle": lambda: curate(files, folder / "shuffle", 0),
            }
            runs = in_turns(sides, repeats=3)
            # On its own: looking at the memory of every process twenty times a second takes a third of a CPU.
            with peak_memory() as peak:
                sides["ours"]()
        finally:
            session.stop()
    result = runs["ours"].last
    say(f"{size:.1f} MB: {result.summary}")
    kernels(texts[:50])
    rate = size / runs["ours"].cpu_median
    peer = peer_rate(DATATROVE, [t for t in texts if len(t) < 20_000][:60])
    report(
        "corpus_dedup", unit="MB/CPU s", ours=rate, peer=peer, peer_name="datatrove 0.10.1, signatures only",
        target=30.0, peak_mib=peak.mib, wall_s=runs["ours"].wall_median,
        kernels=kernels(texts) / runs["ours"].cpu_median,
        over_shuffle=size / runs["shuffle"].cpu_median, documents=result.counts["documents_in"],
        removed=result.counts["audited"],
    )  # fmt: skip


if __name__ == "__main__":
    main()
