"""The actor of batch inference: one engine, fed a unit of rows at a time, all of them in flight together."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from modelyard.align.reward_options import StepsRule
from modelyard.engine import EngineOptions, Request, Sampling, Tokenizer
from modelyard.engine.choose import start
from modelyard.errors import DataError
from modelyard.stages.best_of import Candidate, Chooser
from modelyard.stages.generate_units import Answer, Unit, parse, read_rows, write_part
from modelyard.storage import join, write_bytes


class Writer:
    """Continues the prompts of units and writes their output files.

    Args:
        model: folder or URI of the model.
        engine: options of the engine.
        how: `prompt`, `messages`, `chat`, `system`, `output` and `sampling` of the stage's options.
        output: where output files go.
        done: where each finished unit's record goes, after its file.
        best: folder or URI of a reward model, how many answers to draw for it to choose from, and what the steps of one
            come to; None = one answer.
    """

    def __init__(
        self,
        model: str,
        engine: Mapping[str, Any],
        how: Mapping[str, Any],
        output: str,
        done: str,
        best: tuple[str, int, StepsRule] | None = None,
    ) -> None:
        from modelyard.serving.folders import local_folder

        folder = local_folder(model, weights=True)
        options = EngineOptions.model_validate(engine)
        self._how, self._output, self._done = how, output, done
        self._engine, self._tokenizer = start(folder, options), Tokenizer(folder)
        self._count = best[1] if best is not None else 1
        self._chooser = Chooser(folder, local_folder(best[0], weights=True), best[2]) if best is not None else None
        # Twice the slots: a slot that falls free is filled in the next step.
        self._room = max(1, 2 * options.max_sequences // self._count)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[str]]:
        """One unit a batch: `unit` holds its JSON; gives `record`."""
        return {"record": [json.dumps(self.work(parse(str(text)))) for text in batch["unit"]]}

    def work(self, unit: Unit) -> dict[str, Any]:
        """Answers a unit's rows, writes its file, then its record, and returns the record."""
        answers = asyncio.run(self._answers(unit))
        scored = self._chooser is not None
        write_part(unit, answers, self._how["output"], join(self._output, unit.part), scored)
        record = {
            "index": unit.index, "rows": len(answers), "errors": sum(a.error is not None for a in answers),
            "prompt_tokens": sum(a.prompt_tokens for a in answers), "tokens": sum(a.tokens for a in answers),
        }  # fmt: skip
        write_bytes(join(self._done, f"unit-{unit.index:05d}.json"), json.dumps(record).encode())
        return record

    async def _answers(self, unit: Unit) -> list[Answer]:
        slots = asyncio.Semaphore(self._room)

        async def one(place: int, row: dict[str, Any] | str) -> Answer:
            async with slots:
                try:
                    return await self._answer(unit.first_row + place, row)
                except DataError as error:
                    return Answer(error=f"{error.what}; {error.mend}" if error.mend else error.what)

        return list(await asyncio.gather(*(one(place, row) for place, row in enumerate(read_rows(unit)))))

    async def _answer(self, number: int, row: dict[str, Any] | str) -> Answer:
        """Raises DataError for a row that cannot be answered."""
        if isinstance(row, str):
            raise DataError(row)
        prompt = self._prompt(row)
        room = self._engine.max_length - len(prompt)
        if not prompt or room < 1:
            raise DataError(f"the prompt has {len(prompt):,} tokens and the model takes {self._engine.max_length:,}")
        request = Request(str(number), tuple(prompt), self._sampling(number, room))
        if self._chooser is None:
            return (await self._one(request))[0]
        drawn = await asyncio.gather(*(self._one(each) for each in request.samples(self._count)))
        candidates = [candidate for _, candidate in drawn]
        scores = await asyncio.to_thread(self._chooser.scores, prompt, candidates)
        score, best = max(zip(scores, (answer for answer, _ in drawn), strict=True), key=lambda pair: pair[0])
        return replace(best, score=score)

    async def _one(self, request: Request) -> tuple[Answer, Candidate]:
        parts = [part async for part in self._engine.submit(request)]
        text, tokens = "".join(part.text for part in parts), tuple(t for part in parts for t in part.tokens)
        if parts[-1].finish == "error":
            raise DataError(parts[-1].error)
        answer = Answer(text, parts[-1].finish, len(request.prompt), len(tokens))
        return answer, Candidate(tokens, parts[-1].finish == "stop")

    def _sampling(self, number: int, room: int) -> Sampling:
        """A seed of its own for every row: its answer does not depend on workers, units or neighbours."""
        given = dict(self._how["sampling"])
        seed = given.pop("seed") + (self._count - 1) * number  # those of a row's answers are neighbours
        given["stop"] = tuple(given["stop"])
        return Sampling(**{**given, "max_tokens": min(given["max_tokens"], room)}, seed=(seed + number) % 2**63)

    def _prompt(self, row: Mapping[str, Any]) -> list[int]:
        """Raises DataError when the row has neither field, or a value that is no prompt."""
        system = [{"role": "system", "content": self._how["system"]}] if self._how["system"] else []
        turns, text = row.get(self._how["messages"]), row.get(self._how["prompt"])
        if isinstance(turns, list) and turns and all(isinstance(turn, dict) for turn in turns):
            # Parquet gives every turn every key of the struct: leave the empty ones out.
            plain = [{k: v for k, v in turn.items() if v is not None} for turn in turns]
            return self._tokenizer.encode_chat([*system, *plain])
        if not isinstance(text, str) or not text:
            names = f"{self._how['prompt']} (text) or {self._how['messages']} (turns)"
            raise DataError(f"the row has no {names}")
        if self._how["chat"] and self._tokenizer.template is not None:
            return self._tokenizer.encode_chat([*system, {"role": "user", "content": text}])
        return self._tokenizer.encode(text)
