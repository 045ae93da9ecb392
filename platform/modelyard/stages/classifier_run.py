"""The classifier stage on Ray: one task reads both classes, trains and writes the model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np

from modelyard.corpus.options import ReadOptions
from modelyard.corpus.read.units import Unit, units
from modelyard.stages import curate_ray
from modelyard.stages.base import StageContext, StageResult
from modelyard.stages.classifier import ClassifierOptions
from modelyard.stages.curate import file_refs
from modelyard.storage import absolute

Context = StageContext[ClassifierOptions]


def train(ctx: Context) -> StageResult:
    """Trains and reports what the held-out documents say. Raises DataError when a class has too few documents."""
    work = {name: _units(ctx, name) for name in sorted(ctx.inputs)}
    item = {"units": json.dumps({name: [asdict(u) for u in found] for name, found in work.items()})}
    with curate_ray.quiet(), ctx.progress.task("train classifier", None, "documents") as bar:
        rows = list(curate_ray.rows_of(curate_ray.each([item], _train, ctx.options.resources, ctx.options, ctx.output)))
        about = json.loads(rows[0]["about"])
        bar.advance(about["documents"])
    metrics = {f"held_out_{name}": float(v) for name, v in about["held_out"].items() if name != "documents"}
    ctx.run.log_metrics(metrics)
    summary = f"{about['documents']:,} documents, held-out AUC {about['held_out']['auc']:.4f}"
    counts = {name: int(about[name]) for name in ("documents", "good", "features_seen")}
    return StageResult(summary, counts, metrics, {"held_out": about["held_out"]})


def _units(ctx: Context, name: str) -> list[Unit]:
    refs, artifact = file_refs(ctx.inputs[name])
    refs = [type(r)(absolute(r.uri), r.bytes, r.digest) for r in refs]
    return units(refs, ctx.options.read, frozenset(r.uri for r in refs) if artifact else frozenset())


def _train(item: dict[str, Any], options: ClassifierOptions, output: str) -> Iterator[Any]:
    import pyarrow as pa

    from modelyard.corpus import classifier
    from modelyard.corpus.read.units import Piece

    examples = classifier.Examples(options.bits)
    for name, plain in json.loads(item["units"]).items():
        left = options.max_bytes * (2 if name == "labelled" else 1)
        for unit in (Unit(u["index"], tuple(Piece(**p) for p in u["pieces"])) for u in plain):
            left = _read(unit, name, options, examples, left)
            if left <= 0:
                break
    settings = classifier.TrainSettings(options.epochs, options.learning_rate, options.seed)
    model = classifier.train(examples, settings)
    about = {**model.about, "options": options.model_dump(mode="json", include={"bits", "epochs", "learning_rate"})}
    classifier.Classifier(model.weights, model.bias, model.slope, model.shift, about).save(output)
    yield pa.table({"about": [json.dumps(about)]})


def _read(unit: Unit, name: str, options: ClassifierOptions, examples: Any, left: int) -> int:
    from modelyard.corpus.read.documents import read_unit

    for table, _ in read_unit(unit, ReadOptions.model_validate(options.read)):
        labels = _labels(table, name, options)
        table = table.filter(labels >= 0)
        examples.add(table["text"], table["id"], labels[labels >= 0], options.held_out)
        left -= int(table["text"].nbytes)
        if left <= 0:
            break
    return left


def _labels(table: Any, name: str, options: ClassifierOptions) -> Any:
    """1 = good, 0 = bad, -1 = neither, for each document."""
    if name != "labelled" or options.label is None:
        return np.full(table.num_rows, int(name == "good"), np.int64)
    label, labels = options.label, []
    for meta in table["meta"].to_pylist():
        value = str(json.loads(meta).get(label.field))
        labels.append(1 if value in label.good else 0 if label.bad is None or value in label.bad else -1)
    return np.array(labels, np.int64)
