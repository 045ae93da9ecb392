"""Peak memory of a worker while fuzzy deduplication over the shuffle gets 1, 4 and 16 times the documents.

    python tests/benchmarks/corpus_memory.py

Everything goes over Ray Data's shuffle, clusters by alternating stars, with partitions of 2 MB, so that the
smallest run already has several. `curve` lists [documents, peak MiB a worker]: the largest unique memory (USS) that
any Ray worker of the tree ever had, its imports included. `ours` is how the peak grows from the first to the last
point; `peer` is the growth of a union-find in one process at 180 bytes a node (datatrove's, measured for its
clusters alone), which is that of the documents. The target is a ratio of at most a tenth of the peer's growth.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import psutil
from contract import peak_memory, report, say, tree, unique_mib
from corpus_dedup import curate
from corpus_minhash import documents

from modelyard.stages import curate_clusters, curate_shuffle, session
from modelyard.storage import FileRef, Files

FACTORS = (1, 4, 16)
FILE_BYTES = 5_000_000


def largest_worker() -> float:
    """Unique memory of the largest Ray worker below this process, MiB."""
    return max((unique_mib([process]) for process in tree() if is_worker(process)), default=0.0)


def is_worker(process: psutil.Process) -> bool:
    try:
        return process.cmdline()[:1] != [] and process.cmdline()[0].startswith("ray::")
    except psutil.Error:
        return False


def write_input(folder: Path, texts: list[str], files: int) -> tuple[Files, int]:
    """Files of FILE_BYTES: every other document of a file is a near-copy of one that another file has too."""
    refs, written = [], 0
    for number in range(files):
        path, size, n = folder / f"in-{number:03d}.jsonl", 0, 0
        with path.open("w") as out:
            while size < FILE_BYTES:
                words = texts[n % len(texts)].split()
                # Words of a file's own make documents that are like no others.
                mark = f"f{number}n{n}" if n % 2 else f"g{number // 2}n{n}"
                text = " ".join(f"{word}{mark if k % 3 == 0 else ''}" for k, word in enumerate(words))
                size += out.write(json.dumps({"text": text + f" end{number}"}) + "\n")
                n += 1
        written += n
        refs.append(FileRef(str(path), path.stat().st_size, f"{number}-{size}"))
    return Files(tuple(refs), "bench"), written


def main() -> None:
    """Measures and prints the result line."""
    texts = [text for text in documents(2_000_000) if len(text) < 20_000]
    curve: list[list[float]] = []
    curate_shuffle.PARTITION_BYTES, curate_clusters.MAX_EDGES = 2_000_000, 0
    for factor in FACTORS:
        with tempfile.TemporaryDirectory() as name:
            files, count = write_input(Path(name), texts, 2 * factor)
            # A fresh Ray for every point: no worker carries memory over from the one before.
            session.start(2)
            try:
                with peak_memory(0.5, largest_worker) as peak:
                    result = curate(files, Path(name) / "run", 0)
            finally:
                session.stop()
        curve.append([count, peak.mib])
        say(f"{count:,} documents: {peak.mib:.0f} MiB a worker; {result.summary}")
    growth, documents_growth = curve[-1][1] / curve[0][1], curve[-1][0] / curve[0][0]
    report(
        "corpus_memory", unit="times the memory of the first point", ours=growth, peer=documents_growth,
        peer_name="union-find in one process, 180 bytes a node", target=0.1, better="less", curve=curve,
    )  # fmt: skip


if __name__ == "__main__":
    main()
