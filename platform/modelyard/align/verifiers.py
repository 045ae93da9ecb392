"""Rewards by rule: what an answer is worth, judged by code instead of a model.

A verifier is a function of the prompt's record and the answer's text. Functions of a user's own run in a process
apart (`function_process`), so that one that hangs or crashes costs a time-out and not the run.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from modelyard.align.function_process import FunctionFailed, FunctionProcess
from modelyard.align.options import VerifierOptions
from modelyard.errors import DataError, RecipeError

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:[eE][-+]?\d+)?")
Rule = Callable[[Mapping[str, Any], str], float]


@dataclass(frozen=True)
class Answered:
    """An answer to a task: the task's record and place, the rendered prompt, and the answer's text."""

    row: Mapping[str, Any] = field(hash=False)
    place: str
    prompt: str
    text: str


@dataclass
class Rewards:
    """The weighted sum of every answer, [n]; each verifier's mean; and what failed, by place."""

    total: npt.NDArray[np.float64]
    means: dict[str, float]
    failures: list[str]


class Judge:
    """All verifiers of a run.

    Raises:
        RecipeError: no verifier, a bad pattern or schema, or a function that cannot be imported.
    """

    def __init__(self, verifiers: Sequence[VerifierOptions], failed: float) -> None:
        if not verifiers:
            raise RecipeError("nothing rewards the answers", place="rollouts.verifiers", mend="name a verifier")
        self._failed = failed
        self._rules = [(_name(v, i), v.weight, _rule(v)) for i, v in enumerate(verifiers)]

    def __call__(self, answers: Sequence[Answered]) -> Rewards:
        """Judges answers in order.

        Raises:
            DataError: a record lacks what a verifier compares with.
        """
        total = np.zeros(len(answers))
        means, failures = {}, []
        for name, weight, rule in self._rules:
            values = np.zeros(len(answers))
            for i, answer in enumerate(answers):
                try:
                    values[i] = _finite(rule(answer.row, answer.text) if not isinstance(rule, FunctionProcess)
                                        else rule(answer.prompt, answer.text, answer.row))  # fmt: skip
                except FunctionFailed as error:
                    values[i] = self._failed
                    failures.append(f"{answer.place}: {error}")
                except KeyError as error:
                    raise DataError(
                        f"the record has no {error}, which the verifier {name} compares with",
                        place=answer.place,
                        mend="give the field `answer`, or use another verifier",
                    ) from error
            means[name] = float(values.mean()) if len(values) else 0.0
            total += weight * values
        return Rewards(total, means, failures)

    def close(self) -> None:
        """Ends the processes of functions."""
        for _, _, rule in self._rules:
            if isinstance(rule, FunctionProcess):
                rule.close()


def _name(options: VerifierOptions, number: int) -> str:
    return f"{options.kind}_{number}"


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise FunctionFailed(f"the reward is {value}")
    return value


def _rule(options: VerifierOptions) -> Any:
    if options.kind == "regex":
        return _regex(str(options.pattern))
    if options.kind == "json_schema":
        return _schema(options.json_schema or {})
    if options.kind == "json":
        return lambda row, text: float(_same_json(row["answer"], text))
    if options.kind == "function":
        return FunctionProcess(str(options.function), options.timeout)
    if options.kind == "numeric":
        return lambda row, text: float(_same_number(row["answer"], text, options.tolerance))
    if options.kind == "length":
        return lambda row, text: min(1.0, options.limit / max(1, len(text.split())))
    if options.kind == "contains":
        return lambda row, text: float(str(row["answer"]).strip().lower() in text.lower())
    return lambda row, text: float(str(row["answer"]).strip() == text.strip())


def _regex(pattern: str) -> Rule:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise RecipeError(f"bad pattern: {error}", place="rollouts.verifiers", mend="write a Python regex") from error
    return lambda row, text: float(compiled.search(text) is not None)


def _schema(schema: dict[str, Any]) -> Rule:
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import SchemaError

    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        raise RecipeError(f"bad JSON schema: {error.message}", place="rollouts.verifiers") from error
    validator = Draft202012Validator(schema)

    def judge(_: Mapping[str, Any], text: str) -> float:
        try:
            return float(validator.is_valid(json.loads(text)))
        except (ValueError, RecursionError):
            return 0.0

    return judge


def _same_json(wanted: Any, text: str) -> bool:
    """Whether the whole answer is JSON of this value; 1 and true differ, the order of keys does not matter."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return json.dumps(found, sort_keys=True) == json.dumps(wanted, sort_keys=True)


def _same_number(wanted: Any, text: str, tolerance: float) -> bool:
    """Whether the last number of the answer is the last of what is wanted (GSM8K writes reasoning before it)."""
    found, right = numbers(text), numbers(str(wanted))
    return bool(found and right) and math.isclose(found[-1], right[-1], rel_tol=tolerance, abs_tol=tolerance)


def numbers(text: str) -> list[float]:
    """All numbers of a text; commas separate thousands."""
    return [float(match.replace(",", "")) for match in _NUMBER.findall(text)]


def repetition(tokens: Sequence[int], n: int = 4) -> float:
    """Share of n-grams that occurred before in the answer; 0 for answers shorter than n + 1 tokens."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if len(grams) > 1 else 0.0
