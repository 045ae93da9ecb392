"""Early stopping: by a held-out loss that no longer falls, or by what the next doubling of tokens would buy."""

from __future__ import annotations

from collections.abc import Sequence

from modelyard.planner.fitting import advise
from modelyard.train.checkpoint import Row
from modelyard.train.run_options import StopOptions

_POINTS = 6
"""Evaluations the predicted gain needs: five for a curve, and one so that the first is not all warm-up."""


def stop_reason(options: StopOptions | None, history: Sequence[Row]) -> str:
    """Why to stop after the steps of `history`; empty = go on.

    A function of the table alone: every worker and a resumed run come to the same answer.
    """
    if options is None or not history or int(history[-1]["step"]) % options.every:
        return ""
    points = [(row["tokens"], row["heldout_loss"]) for row in history if _counts(row, options)]
    return _no_progress(points, options) or _little_gain(points, options)


def _counts(row: Row, options: StopOptions) -> bool:
    return "heldout_loss" in row and int(row["step"]) % options.every == 0


def _no_progress(points: Sequence[tuple[float, float]], options: StopOptions) -> str:
    best, since = float("inf"), 0
    for _, loss in points:
        if loss < best - options.min_delta:
            best, since = loss, 0
        else:
            since += 1
    if since < options.patience:
        return ""
    return f"the held-out loss has not fallen by {options.min_delta:g} in {since} evaluations (best {best:.4f})"


def _little_gain(points: Sequence[tuple[float, float]], options: StopOptions) -> str:
    if options.gain is None or len(points) < _POINTS:
        return ""
    advice = advise(points, worth=options.gain)
    return advice.text if advice.stop else ""
