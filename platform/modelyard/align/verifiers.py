"""Rewards by rule: what an answer is worth, judged by code instead of a model.

A verifier is a function of the prompt's record and the answer's text. Functions of a user's own run in a process
apart (`function_process`), so that one that hangs or crashes costs a time-out and not the run.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from modelyard.align.answered import Answered, Failure, Value
from modelyard.align.function_process import FunctionFailed, FunctionProcess
from modelyard.align.refusals import LABELS, refuses
from modelyard.align.reward_options import VerifierOptions
from modelyard.errors import DataError, RecipeError

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:[eE][-+]?\d+)?")
Rule = Callable[[Mapping[str, Any], str], float]


class Verifier:
    """One rule over answers; a source of `rewards.RewardMix`.

    Raises:
        RecipeError: a bad pattern or schema, or a function that cannot be imported.
    """

    def __init__(self, options: VerifierOptions) -> None:
        self._kind = options.kind
        self._function = FunctionProcess(str(options.function), options.timeout) if options.kind == "function" else None
        self._rule = _rule(options) if self._function is None else None

    def __call__(self, answers: Sequence[Answered]) -> list[Value]:
        """What every answer is worth, or why that cannot be said.

        Raises:
            DataError: a record lacks what the rule compares with.
        """
        return [self._judge(answer) for answer in answers]

    def close(self) -> None:
        """Ends the process of a function."""
        if self._function is not None:
            self._function.close()

    def _judge(self, answer: Answered) -> Value:
        try:
            if self._function is not None:
                return self._function(answer.prompt, answer.text, answer.row)
            assert self._rule is not None
            return self._rule(answer.row, answer.text)
        except FunctionFailed as error:
            return Failure(str(error))
        except KeyError as error:
            raise DataError(
                f"the record has no {error}, which the verifier {self._kind} compares with",
                place=answer.place,
                mend="give the field, or use another verifier",
            ) from error


def _rule(options: VerifierOptions) -> Rule:
    if options.kind == "regex":
        return _regex(str(options.pattern))
    if options.kind == "json_schema":
        return _schema(options.json_schema or {})
    if options.kind == "code":
        return _code(options)
    if options.kind == "json":
        return lambda row, text: float(_same_json(row["answer"], text))
    if options.kind == "numeric":
        return lambda row, text: float(_same_number(row["answer"], text, options.tolerance))
    if options.kind == "length":
        return lambda row, text: min(1.0, options.limit / max(1, len(text.split())))
    if options.kind == "refusal":
        return _rightly_refused
    if options.kind == "contains":
        return lambda row, text: float(str(row["answer"]).strip().lower() in text.lower())
    return lambda row, text: float(str(row["answer"]).strip() == text.strip())


def _code(options: VerifierOptions) -> Rule:
    from modelyard.align.code_sandbox import can_confine, passes

    if not can_confine():
        raise RecipeError("this system cannot confine code: Linux's Landlock is not there", place="rollouts.rewards",
                          mend="use a kernel from 5.13 with Landlock switched on, or a function you trust")  # fmt: skip
    if not passes("", "", options.timeout, options.memory):
        raise RecipeError(
            f"not even empty code runs confined in {options.memory:,} bytes and {options.timeout:g} s",
            place="rollouts.rewards",
            mend="raise memory or timeout",
        )
    return lambda row, text: float(passes(text, row["tests"], options.timeout, options.memory))


def _rightly_refused(row: Mapping[str, Any], text: str) -> float:
    return float(LABELS.get(row["label"]) is refuses(text))


def _regex(pattern: str) -> Rule:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise RecipeError(f"bad pattern: {error}", place="rollouts.rewards", mend="write a Python regex") from error
    return lambda row, text: float(compiled.search(text) is not None)


def _schema(schema: dict[str, Any]) -> Rule:
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import SchemaError

    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        raise RecipeError(f"bad JSON schema: {error.message}", place="rollouts.rewards") from error
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
