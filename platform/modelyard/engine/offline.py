"""Many requests through an engine in the caller's thread, for programs that need no streaming."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from modelyard.engine.request import Request, StepOutput
from modelyard.errors import DataError

if TYPE_CHECKING:
    from modelyard.engine.protocol import Stepper


@dataclass(frozen=True)
class Completion:
    """A finished answer: everything its step outputs said, as one."""

    request: Request
    output: StepOutput


def generate(core: Stepper, requests: Iterable[Request]) -> list[Completion]:
    """Continues all requests and returns their answers in order.

    Raises DataError when the engine is paused: nobody could resume it meanwhile.
    """
    if core.paused:
        raise DataError("the engine is paused", place="engine", mend="resume it first")
    wanted = list(requests)
    outputs: dict[str, StepOutput] = {}
    queue = iter(wanted)
    pending = next(queue, None)
    while pending is not None or core.busy:
        while pending is not None and core.waiting < core.options.max_sequences:
            core.add(pending)
            pending = next(queue, None)
        for name, output in core.step():
            outputs[name] = outputs[name] + output if name in outputs else output
    return [Completion(r, outputs[r.id]) for r in wanted]
