"""What a stage would learn from its data: the tokens of some examples, and which of them the loss counts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any

from modelyard.errors import RecipeError
from modelyard.recipe import Recipe
from modelyard.stages.examples import Examples, read_examples
from modelyard.stages.graph import anchored, plan_context, plan_graph

if TYPE_CHECKING:
    from modelyard.align.steps import Stepped


@dataclass(frozen=True)
class Shown:
    """One conversation as it is trained on.

    Attributes:
        title: what it is, and where it comes from.
        runs: text of consecutive tokens, and whether they are learnt.
        tokens: how many there are.
        learnt: how many of them are learnt.
        cut: tokens beyond the length, which are left out.
    """

    title: str
    runs: Sequence[tuple[str, bool]]
    tokens: int
    learnt: int
    cut: int


def inspect_stage(recipe: Recipe, stage: str, rows: int) -> list[Shown]:
    """The first `rows` examples of a `finetune`, `align` or `reward` stage; reads its data, trains nothing.

    Raises:
        RecipeError: no such stage, a kind that trains on no examples, or inputs that do not exist yet.
        DataError: the data cannot be used.
    """
    recipe = anchored(recipe)
    planned = {entry.node.name: entry for entry in plan_graph(recipe)}
    if stage not in planned:
        raise RecipeError(f"no stage {stage!r}", place="inspect", mend=f"stages: {', '.join(planned)}")
    kind = planned[stage].node.options.kind
    if kind not in ("finetune", "align", "reward"):
        raise RecipeError(f"a {kind} stage trains on no examples", place=stage, mend="name a finetune or align stage")
    ctx = plan_context(recipe, planned[stage], {n: e.artifact for n, e in planned.items() if e.artifact})
    missing = [name for name in ("model", "data") if name not in ctx.inputs]
    if missing:
        raise RecipeError(
            f"its input {missing[0]} does not exist yet", place=stage, mend="run the stages before it first (--to)"
        )
    return list(islice(_shown(ctx.options, ctx.inputs), rows))


def _shown(options: Any, inputs: Any) -> Iterator[Shown]:
    from modelyard.align import records
    from modelyard.align.encode import use_template
    from modelyard.align.steps import StepReader
    from modelyard.stages.finetune import read_pairs, read_tokenizer
    from modelyard.train.pairs import encode_chat

    tokenizer = use_template(read_tokenizer(inputs["model"]), options.examples.template)
    data, length, allowed = inputs["data"], options.sequence_length, options.examples.bad_rows

    def show(title: str, messages: Any, learn: Any = "last", since: int = 1) -> Shown:
        whole = encode_chat(tokenizer, messages, learn, since)
        cut = whole.cut(length)
        marked = zip(cut.ids.tolist(), cut.learnt.tolist(), strict=True)
        runs = [(tokenizer.decode([i for i, _ in run]), key) for key, run in groupby(marked, key=lambda item: item[1])]
        return Shown(title, runs, len(cut.ids), int(cut.learnt.sum()), len(whole.ids) - len(cut.ids))

    if options.kind == "reward" and options.reward.process is not None:
        reader = StepReader(tokenizer, options.reward.process.separator, length)
        for example in read_examples(data, reader, allowed).good:
            yield _shown_steps(example, tokenizer, length)
    elif options.kind == "finetune":
        for pair in read_pairs(data, options.examples).good:
            answer = {"role": "assistant", "content": pair.completion}
            yield show(pair.place, (*pair.messages, answer), options.examples.learn)
    elif getattr(options, "method", "") == "kto":
        opinions: Examples[records.Feedback] = read_examples(data, records.feedback, allowed)
        for opinion in opinions.good:
            verdict = "liked" if opinion.label else "disliked"
            answer = {"role": "assistant", "content": opinion.completion}
            yield show(f"{opinion.place}, {verdict}", (*opinion.prompt, answer))
    else:
        for both in read_examples(data, records.preference, allowed).good:
            for name, side in (("chosen", both.chosen), ("rejected", both.rejected)):
                yield show(f"{both.place}, {name}", (*both.prompt, *side), "turns", len(both.prompt))


def _shown_steps(example: Stepped, tokenizer: Any, length: int) -> Shown:
    """An answer in steps: learnt is the token at which a step's score is read, behind the step's label."""
    cut = example.document.cut(length)
    assert cut.labels is not None
    runs: list[tuple[str, bool]] = []
    start = 0
    for end in (cut.labels >= 0).nonzero()[0].tolist():
        runs.append((tokenizer.decode(cut.ids[start:end].tolist()), False))
        runs.append((f"[{cut.labels[end]:g}]{tokenizer.decode([int(cut.ids[end])])}", True))
        start = end + 1
    runs.append((tokenizer.decode(cut.ids[start:].tolist()), False))
    read = sum(learnt for _, learnt in runs)
    return Shown(f"{example.place}, {len(example.steps)} steps", runs, len(cut.ids), read,
                 len(example.document.ids) - len(cut.ids))  # fmt: skip
