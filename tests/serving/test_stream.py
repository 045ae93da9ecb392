"""What every streamed chunk passes: a limit of time for all waits, and how it becomes bytes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from modelyard.engine.request import StepOutput
from modelyard.engine.tokenizer import Tokenizer
from modelyard.serving.answers import ChatForm, TextForm
from modelyard.serving.deadline import Deadline


@pytest.mark.parametrize("kind", [TextForm, ChatForm])
@pytest.mark.parametrize("usage", [True, False])
def test_text_put_into_a_prepared_event_is_the_event(
    tiny_model: Path, kind: type[TextForm] | type[ChatForm], usage: bool
) -> None:
    form = kind('a "name"', Tokenizer(tiny_model), include_usage=usage)
    for text in (" word", 'say "hi"\\\r\n\t', "\0\x1f\x7f", "é\u2028\U0001f600"):
        for index in (0, 2):
            encoded = form.chunk(index, StepOutput((5,), text, finish="length"))
            assert encoded is not None
            expected = encoded.replace(b'"finish_reason":"length"', b'"finish_reason":null')
            assert form.chunk(index, StepOutput((5,), text)) == expected
    assert form.chunk(0, StepOutput((5,))) is None


def test_a_deadline_cuts_the_wait_it_falls_into_and_refuses_later_ones() -> None:
    async def wait(deadline: Deadline, seconds: float) -> str:
        try:
            with deadline:
                await asyncio.sleep(seconds)
        except TimeoutError:
            await asyncio.sleep(0)  # the task goes on: nothing is left of the cancellation
            return "late"
        return "in time"

    async def main() -> list[str]:
        deadline = Deadline(0.05)
        return [await asyncio.create_task(wait(deadline, seconds)) for seconds in (0, 0, 60, 0)]

    assert asyncio.run(main()) == ["in time", "in time", "late", "late"]


def test_who_cancels_a_wait_within_a_deadline_gets_what_it_asked_for() -> None:
    async def main() -> bool:
        deadline = Deadline(60)

        async def wait() -> None:
            with deadline:
                await asyncio.sleep(60)

        task = asyncio.create_task(wait())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task})
        deadline.end()
        return task.cancelled()

    assert asyncio.run(main())
