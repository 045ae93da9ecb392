"""The linear classifier: scores from raw text, and AUC on held-out text, against fastText on the same documents.

    python tests/benchmarks/corpus_classifier.py

Speed is measured on ordinary text. Labelled text is toxicity_en.csv (surge-ai) where MODELYARD_BENCH_DATA holds
it, else paragraphs of documentation against comments of sources. Every fifth document is held out from both;
of the rest ours takes a fifth to calibrate and measure. fastText: 2-grams, 2^18 buckets, 10 dimensions.
"""

from __future__ import annotations

import csv
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from contract import in_turns, report, run_peer, say, text_files
from corpus_minhash import documents

from modelyard.corpus.classifier import Examples, TrainSettings, auc, train

FASTTEXT = """
import json, sys, tempfile, time
import fasttext
train, test, speed = (json.load(open(name)) for name in sys.argv[1:4])
flat = lambda text: " ".join(text.lower().split())
with tempfile.NamedTemporaryFile("w", suffix=".txt", delete=False) as handle:
    for text, label in train:
        handle.write(f"__label__{label} {flat(text)}\\n")
model = fasttext.train_supervised(handle.name, wordNgrams=2, bucket=1 << 18, dim=10, epoch=25, lr=0.5, thread=1,
                                  verbose=0)
def score(text):
    found = model.f.predict(flat(text) + "\\n", 2, 0.0, "strict")
    return next((p for p, label in found if label == "__label__1"), 0.0)
speed[:3] and [score(t) for t in speed[:3]]
start = time.process_time()
for text in speed:
    score(text)
cpu = time.process_time() - start
print(json.dumps({"cpu": cpu, "scores": [score(text) for text, _ in test]}))
"""

_COMMENTS = re.compile(r"(?:^[ \t]*#[^\n]*\n){3,}", re.MULTILINE)


def labelled() -> list[tuple[str, int]]:
    """Texts with 1 or 0."""
    folder = os.environ.get("MODELYARD_BENCH_DATA")
    for path in sorted(Path(folder).rglob("toxicity_en.csv")) if folder else []:
        with path.open(newline="") as handle:
            return [(row["text"], int(row["is_toxic"] == "Toxic")) for row in csv.DictReader(handle)]
    rows: list[tuple[str, int]] = []
    for path in text_files(6_000_000, (".md", ".rst")):
        rows += [(p, 1) for p in path.read_text(errors="replace").split("\n\n") if len(p) > 80]
    for path in text_files(6_000_000, (".py",)):
        rows += [(c, 0) for c in _COMMENTS.findall(path.read_text(errors="replace"))]
    return rows


def main() -> None:
    """Measures and prints the result line."""
    rows = labelled()
    test, learn = rows[::5], [row for n, row in enumerate(rows) if n % 5]
    examples = Examples(18)
    labels = np.array([label for _, label in learn], np.int64)
    examples.add(pa.array([text for text, _ in learn]), [str(n) for n in range(len(learn))], labels, 0.2)
    model = train(examples, TrainSettings(epochs=5))
    truth = np.array([label for _, label in test])
    ours_auc = auc(model(pa.array([text for text, _ in test])), truth)
    texts = documents()
    column, size = pa.array(texts), sum(len(text.encode()) for text in texts) / 1e6
    ours = in_turns({"ours": lambda: model(column)}, repeats=5)["ours"]
    some = texts[:: max(len(texts) // 300, 1)]
    with tempfile.TemporaryDirectory() as folder:
        names = [Path(folder) / f"{n}.json" for n in ("train", "test", "speed")]
        for name, content in zip(names, (learn, test, some), strict=True):
            name.write_text(json.dumps(content))
        peers: list[Any] = [run_peer(FASTTEXT, *map(str, names)) for _ in range(3)]
    rates = sorted(sum(len(t.encode()) for t in some) / 1e6 / p["cpu"] for p in peers)
    say(f"{len(learn):,} to train, {len(test):,} held out")
    report(
        "corpus_classifier", unit="MB/CPU s", ours=size / ours.cpu_median, peer=rates[1],
        peer_name="fastText 0.9.2 predict", target=2.0, auc=ours_auc, peer_auc=auc(np.array(peers[0]["scores"]), truth),
        documents=len(rows), held_out=model.about["held_out"],
    )  # fmt: skip


if __name__ == "__main__":
    main()
