"""Training, calibration, measurement and storage of the linear text classifier of `kernels.linear`.

The model is two files, `model.safetensors` (weights, bias, calibration) and `classifier.json` (what they mean
and how well they do); neither can hold code.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from modelyard.corpus.arrow import buffers
from modelyard.errors import DataError
from modelyard.storage import join, read_bytes, write_bytes

WEIGHTS, ABOUT = "model.safetensors", "classifier.json"
_FORMAT = 1
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Classifier:
    """A trained model.

    Attributes:
        weights: float32 [2 ** bits].
        bias: of the raw score.
        slope, shift: Platt's calibration: probability = 1 / (1 + exp(-(slope * raw + shift))).
        about: metrics and options, for people.
    """

    weights: Floats
    bias: float
    slope: float = 1.0
    shift: float = 0.0
    about: dict[str, Any] = field(default_factory=dict)

    def raw(self, text: Any) -> Floats:
        """Log odds before calibration of each text of an Arrow column."""
        from modelyard.corpus.kernels.linear import scores

        return scores(*buffers(text), self.weights, self.bias)

    def __call__(self, text: Any) -> Floats:
        """Calibrated probability of the class `good` for each text, float32."""
        probability: Floats = _sigmoid(self.slope * self.raw(text) + self.shift)
        return probability

    def save(self, folder: str) -> None:
        """Writes the two files."""
        from safetensors.numpy import save

        numbers = np.array([self.bias, self.slope, self.shift], np.float64)
        write_bytes(join(folder, WEIGHTS), save({"weights": self.weights, "calibration": numbers}))
        about = {"format": _FORMAT, "features": "hashed words and word pairs, unit length", **self.about}
        write_bytes(join(folder, ABOUT), json.dumps(about, indent=1, sort_keys=True).encode())


@functools.lru_cache(4)
def load(uris: tuple[str, ...]) -> Classifier:
    """The model among `uris`, the files of a classifier stage or copies of them.

    Raises:
        DataError: a file is missing, damaged, or of another format.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load as read

    names = {uri.rsplit("/", 1)[-1]: uri for uri in uris}
    if WEIGHTS not in names or ABOUT not in names:
        place = ", ".join(sorted(names)) or "no files"
        raise DataError("this is no classifier", place=place, mend=f"give the folder with {WEIGHTS} and {ABOUT}")
    try:
        about = json.loads(read_bytes(names[ABOUT]))
        if about.get("format") != _FORMAT:
            raise ValueError(f"format {about.get('format')}")
        tensors = read(read_bytes(names[WEIGHTS]))
        weights, (bias, slope, shift) = tensors["weights"], tensors["calibration"].tolist()
        if weights.ndim != 1 or weights.dtype != np.float32 or len(weights) & (len(weights) - 1):
            raise ValueError(f"weights {weights.shape} {weights.dtype}")
    except (ValueError, KeyError, AttributeError, SafetensorError) as error:
        raise DataError(f"cannot be read: {error}", place=names[WEIGHTS], mend="train it again") from error
    return Classifier(weights, bias, slope, shift, about)


@dataclass
class Examples:
    """Features of labelled documents, 4 bytes a distinct word or pair: what training holds in memory."""

    bits: int
    found: list[npt.NDArray[np.int32]] = field(default_factory=list)
    sizes: list[npt.NDArray[np.int64]] = field(default_factory=list)
    labels: list[npt.NDArray[np.int64]] = field(default_factory=list)
    parts: list[npt.NDArray[np.int64]] = field(default_factory=list)

    def add(self, text: Any, ids: Any, labels: npt.NDArray[np.int64], held_out: float) -> None:
        """Adds documents; the hash of a document's id decides whether it trains (0), calibrates (1) or tests (2)."""
        from modelyard.corpus.kernels.linear import extract
        from modelyard.corpus.kernels.minhash import FOLD

        data, offsets = buffers(text)
        if not len(labels):
            return
        out = np.empty(int(offsets[-1] - offsets[0]) * 2 + 2 * len(labels) + 2, np.int64)
        ends = np.empty(len(labels), np.int64)
        used = extract(data, offsets, FOLD, np.zeros(1 << self.bits, np.int32), out, ends)
        self.found.append(out[:used].astype(np.int32))
        self.sizes.append(np.diff(ends, prepend=0))
        self.labels.append(labels)
        draw = uniform(ids, "held out")
        self.parts.append(np.where(draw >= held_out, 0, np.where(draw < held_out / 2, 1, 2)))


@dataclass(frozen=True)
class TrainSettings:
    """How to train: passes, AdaGrad's step, the seed of the order."""

    epochs: int = 5
    rate: float = 0.5
    seed: int = 0


def train(examples: Examples, settings: TrainSettings) -> Classifier:
    """Fits the weights on part 0, the calibration on part 1, and measures on part 2.

    Both classes count the same, whatever their sizes.

    Raises:
        DataError: a class has no documents in one of the parts.
    """
    from modelyard.corpus.kernels.linear import epoch

    found, ends = np.concatenate(examples.found), np.cumsum(np.concatenate(examples.sizes))
    labels, parts = np.concatenate(examples.labels), np.concatenate(examples.parts)
    counts = {(p, c): int(((parts == p) & (labels == c)).sum()) for p in range(3) for c in range(2)}
    if not all(counts.values()):
        sizes = f"{int((labels == 1).sum())} good and {int((labels == 0).sum())} bad documents"
        raise DataError(
            f"{sizes} are too few to train, calibrate and test",
            mend="give some hundred documents of each class",
        )
    weights, squares = np.zeros((1 << examples.bits) + 1, np.float32), np.zeros((1 << examples.bits) + 1, np.float32)
    rows = np.flatnonzero(parts == 0)
    scale = np.array([len(rows) / 2 / counts[0, 0], len(rows) / 2 / counts[0, 1]])
    rng, losses = np.random.Generator(np.random.PCG64(settings.seed)), []
    for turn in range(settings.epochs):
        rate = settings.rate * (1 - turn / settings.epochs)
        losses.append(float(epoch(rng.permutation(rows), found, ends, labels, scale, rate, weights, squares)))
    raw = _raw(found, ends, weights)
    slope, shift = platt(raw[parts == 1], labels[parts == 1])
    test = parts == 2
    about = {
        "documents": len(labels), "good": int(labels.sum()), "features_seen": int(np.count_nonzero(squares)),
        "losses": losses, "held_out": measure(_sigmoid(slope * raw[test] + shift), labels[test]),
    }  # fmt: skip
    return Classifier(weights[:-1].copy(), float(weights[-1]), slope, shift, about)


def _raw(found: Any, ends: Any, weights: Any) -> npt.NDArray[np.float64]:
    sums = np.concatenate([[0.0], np.cumsum(weights[found], dtype=np.float64)])
    starts = np.concatenate([[0], ends[:-1]])
    sizes = np.maximum(ends - starts, 1)
    return np.asarray(weights[-1] + (sums[ends] - sums[starts]) / np.sqrt(sizes), np.float64)


def _sigmoid(value: Any) -> Any:
    return (1 / (1 + np.exp(-np.clip(value, -60, 60)))).astype(np.asarray(value).dtype)


def platt(raw: Any, labels: Any) -> tuple[float, float]:
    """(slope, shift) that make scores probabilities (Platt 1999, with his smoothed targets), by Newton steps."""
    good, bad = int(labels.sum()), int((1 - labels).sum())
    target = np.where(labels == 1, (good + 1) / (good + 2), 1 / (bad + 2))
    x = np.stack([raw, np.ones_like(raw)], 1)
    w = np.array([1.0, 0.0])
    for _ in range(50):
        p = _sigmoid(x @ w)
        hessian = (x * (p * (1 - p))[:, None]).T @ x + 1e-6 * np.eye(2)
        step = np.linalg.solve(hessian, x.T @ (p - target))
        w = w - np.clip(step, -1, 1)
        if np.abs(step).max() < 1e-8:
            break
    return float(w[0]), float(w[1])


def auc(scores: Any, labels: Any) -> float:
    """Area under the ROC curve: the chance that a good document scores above a bad one (ties half)."""
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    good, bad = int(labels.sum()), int((1 - labels).sum())
    return float((ranks[labels == 1].sum() - good * (good + 1) / 2) / (good * bad))


def measure(probability: Any, labels: Any) -> dict[str, float]:
    """auc, accuracy at 0.5, brier (mean squared error), and calibration_error: the mean gap between probability and
    share of good documents over ten equal bins of probability."""
    bins = np.minimum((probability * 10).astype(int), 9)
    gaps = [abs(probability[bins == b].sum() - labels[bins == b].sum()) for b in range(10)]
    return {
        "documents": len(labels), "auc": auc(probability, labels),
        "accuracy": float(((probability >= 0.5) == (labels == 1)).mean()),
        "brier": float(((probability - labels) ** 2).mean()), "calibration_error": float(sum(gaps) / len(labels)),
    }  # fmt: skip


def uniform(ids: Any, salt: str) -> npt.NDArray[np.float64]:
    """A number in [0, 1) for each id, the same wherever and whenever it is drawn."""
    import xxhash

    values = ids.to_pylist() if hasattr(ids, "to_pylist") else ids
    return np.array([xxhash.xxh64_intdigest(f"{salt}\0{i}".encode()) >> 11 for i in values], np.float64) / float(
        1 << 53
    )
