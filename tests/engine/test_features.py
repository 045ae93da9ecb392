"""What requests can ask for beyond a plain answer: prefixes, scores, vectors, grammars, guesses, pausing."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import CPU
from tiny import save_model
from transformers import AutoModelForCausalLM

from modelyard.engine import EngineCore, EngineOptions, Grammar, NativeEngine, Request, Sampling, generate
from modelyard.engine.calibrate import _loss, pack_int8
from modelyard.engine.checkpoint import read_tensors
from modelyard.engine.decoder import Decoder
from modelyard.engine.options import Speculation
from modelyard.engine.speculate import DraftModel
from modelyard.errors import DataError, ResourceError

GREEDY = Sampling(max_tokens=12, temperature=0.0, ignore_eos=True)
SHARED = tuple(int(t) for t in torch.randint(5, 380, (100,), generator=torch.Generator().manual_seed(3)))


def options(**changes: Any) -> EngineOptions:
    return EngineOptions(**({"max_sequences": 4, "step_tokens": 64, "threads": 1, "precision": "float32"} | changes))


@pytest.fixture(scope="module")
def core(tiny_model: Path) -> EngineCore:
    return EngineCore(tiny_model, options())


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


def tokens(core: EngineCore, requests: list[Request]) -> list[tuple[int, ...]]:
    found = [c.output.tokens for c in generate(core, requests)]
    assert core.invariants() == []
    assert core.scheduler.blocks.used == core.scheduler.slots.used == 0
    return found


def test_answers_are_the_same_with_and_without_the_prefix_cache(tiny_model: Path, core: EngineCore) -> None:
    requests = [Request(f"{i}", (*SHARED[: 90 + i], 7 + i), GREEDY) for i in range(6)]
    plain = tokens(EngineCore(tiny_model, options(prefix_cache=False)), requests)
    before = core.stats()
    assert tokens(core, requests) == plain
    assert tokens(core, requests) == plain
    assert core.stats().prefix_hit_tokens_total - before.prefix_hit_tokens_total > 800
    warm = generate(core, [replace(requests[0], id="x")])[0].output
    assert warm.cached == 80, "five full blocks; what is left of the prompt is computed"


def test_an_answer_of_one_token_leaves_its_prefix_too(tiny_model: Path) -> None:
    core = EngineCore(tiny_model, options())
    one = Sampling(max_tokens=1, temperature=0.0)
    generate(core, [Request("a", SHARED, one)])
    assert generate(core, [Request("b", SHARED, one)])[0].output.cached == 96


def test_samples_share_their_prompt(tiny_model: Path) -> None:
    core = EngineCore(tiny_model, options())
    group = Request("g", SHARED, Sampling(max_tokens=6, seed=1, ignore_eos=True)).samples(4)
    alone = [tokens(EngineCore(tiny_model, options()), [r])[0] for r in group[1:3]]
    assert tokens(core, group)[1:3] == alone
    assert core.stats().prompt_tokens_total == 100 + 3 * 4


def test_new_weights_empty_the_prefix_cache(tiny_model: Path, tmp_path: Path) -> None:
    core = EngineCore(tiny_model, options())
    generate(core, [Request("a", SHARED, GREEDY)])
    other = save_model(tmp_path / "other", seed=1)
    core.update_weights(read_tensors(other), version=1)
    output = generate(core, [Request("b", SHARED, GREEDY)])[0].output
    assert (output.cached, output.weights, output.weights_first) == (0, 1, 1)
    assert output.tokens == tokens(EngineCore(other, options()), [Request("b", SHARED, GREEDY)])[0]


def test_preempted_answers_are_what_they_would_have_been(tiny_model: Path) -> None:
    long = Sampling(max_tokens=100, temperature=1.0, seed=4, ignore_eos=True)
    requests = [Request(f"{i}", (9 + i, 8, 7), long) for i in range(4)]
    tight = EngineCore(tiny_model, options(cache_tokens=256))
    assert tokens(tight, requests) == tokens(EngineCore(tiny_model, options()), requests)
    assert tight.stats().preempted_total > 0


def test_scores_are_those_of_transformers(core: EngineCore, model: Any) -> None:
    with torch.inference_mode():
        expected = model(torch.tensor([SHARED])).logits[0].log_softmax(-1)
    truth = [float(expected[i - 1, t]) for i, t in enumerate(SHARED) if i]
    request = Request("s", SHARED, task="score", prompt_logprobs=2)
    for start in (1, 60, 99, 100):
        output = generate(core, [replace(request, logprobs_from=start)])[0].output
        assert [p.logprob for p in output.prompt_logprobs] == pytest.approx(truth[start - 1 :], abs=1e-4)
        assert output.finish == "stop" and not output.tokens
    assert output.cached > 0
    both = generate(core, [Request("b", SHARED, GREEDY, prompt_logprobs=0)])[0].output
    assert len(both.prompt_logprobs) == 99
    assert len(both.tokens) == 12


def test_vectors_are_the_last_layers(core: EngineCore, model: Any) -> None:
    with torch.inference_mode():
        states = model.model(torch.tensor([SHARED])).last_hidden_state[0]
    for pooling, vector in (("mean", states.mean(0)), ("last", states[-1])):
        got = generate(core, [Request("e", SHARED, task="embed", pooling=pooling)])[0].output.embedding  # type: ignore[arg-type]
        assert torch.allclose(torch.tensor(got), torch.nn.functional.normalize(vector, dim=0), atol=1e-5)


def test_the_asynchronous_engine_scores_embeds_pauses_and_resumes(tiny_model: Path) -> None:
    engine = NativeEngine(tiny_model, options())

    async def run() -> None:
        engine.pause()
        task = asyncio.create_task(engine.score([SHARED, SHARED[:50]], start=3))
        await asyncio.sleep(0.05)
        assert engine.stats().paused and engine.stats().steps_total == 0
        engine.resume()
        scored = await task
        assert [len(s.logprobs) for s in scored] == [97, 47]
        assert scored[0].logprobs[:47] == pytest.approx(scored[1].logprobs, abs=1e-4)
        assert scored[1].total == pytest.approx(sum(scored[1].logprobs))
        vectors = await engine.embed([SHARED, SHARED])
        assert vectors[0] == pytest.approx(vectors[1], abs=1e-6)
        with pytest.raises(DataError, match="not loaded"):
            await engine.score([SHARED], adapter="nobody")

    asyncio.run(run())
    assert engine.invariants() == []
    engine.close()


SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"name": {"enum": ["ant", "bee"]}, "legs": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["name", "legs"],
        "additionalProperties": False,
    }
)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_answers_match_their_grammar(core: EngineCore, temperature: float) -> None:
    pytest.importorskip("llguidance")
    base = Sampling(max_tokens=60, temperature=temperature, seed=2)
    requests = [
        Request("schema", (9, 8), replace(base, grammar=Grammar("json_schema", SCHEMA))),
        Request("regex", (9, 8), replace(base, grammar=Grammar("regex", "[0-9]{3}-[a-c]{2}"), ignore_eos=True)),
        Request("free", (9, 8), replace(base, max_tokens=5)),
    ]
    schema, regex, _ = (c.output for c in generate(core, requests))
    value = json.loads(schema.text)
    assert value["name"] in ("ant", "bee") and 0 <= value["legs"] <= 9
    assert re.fullmatch("[0-9]{3}-[a-c]{2}", regex.text)
    assert schema.finish == regex.finish == "stop"
    assert core.invariants() == []


@pytest.mark.parametrize(
    ("grammar", "says"),
    [
        (Grammar("json_schema", "{not json"), "malformed"),
        (Grammar("json_schema", '{"type": "string", "minLength": 5, "maxLength": 2}'), "satisfied"),
        (Grammar("json_schema", "false"), "satisfied|malformed"),
        (Grammar("regex", "(["), "satisfied"),
    ],
)
def test_grammars_nobody_can_satisfy_are_refused(core: EngineCore, grammar: Grammar, says: str) -> None:
    pytest.importorskip("llguidance")
    with pytest.raises(DataError, match=says):
        core.add(Request("x", (5,), Sampling(grammar=grammar)))
    assert not core.busy
    assert core.invariants() == []


def test_guessing_ahead_changes_no_answer(tiny_model: Path, core: EngineCore, tmp_path: Path) -> None:
    draft = save_model(tmp_path / "draft", seed=0, num_hidden_layers=1)
    repeats = tuple([11, 12, 13, 14, 15] * 8)
    requests = [
        Request("greedy", repeats, replace(GREEDY, max_tokens=40)),
        Request("warm", repeats, Sampling(max_tokens=40, temperature=0.7, top_p=0.9, seed=3, ignore_eos=True)),
        Request("penalized", repeats, Sampling(max_tokens=20, repetition_penalty=1.3, seed=3, ignore_eos=True)),
        Request("long", SHARED, Sampling(max_tokens=200, temperature=0.0, ignore_eos=True)),
    ]
    expected = tokens(core, requests)
    drafts = [Speculation(method="draft_model", model=str(folder)) for folder in (draft, tiny_model)]
    for speculation in [Speculation(ngram=2), *drafts]:
        guessing = EngineCore(tiny_model, options(speculation=speculation))
        assert tokens(guessing, requests) == expected
        assert tokens(guessing, requests) == expected, "after other requests that the draft knew"
        stats = guessing.stats()
        assert stats.drafted_total > 0
        if speculation.model == str(tiny_model):
            assert stats.accepted_total > 0.9 * stats.drafted_total, "a model agrees with itself"
            assert stats.steps_total < 300


def test_a_draft_of_another_vocabulary_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    other = save_model(tmp_path / "draft", vocab_size=500)
    with pytest.raises(DataError, match="500 tokens"):
        EngineCore(tiny_model, options(speculation=Speculation(method="draft_model", model=str(other))))


@CPU
def test_a_draft_is_never_of_int8_which_nothing_would_check(tiny_model: Path) -> None:
    speculation = Speculation(method="draft_model", model=str(tiny_model))
    core = EngineCore(tiny_model, options(precision="int8", max_loss_increase=5.0, speculation=speculation))
    assert isinstance(core.guesser, DraftModel) and isinstance(core.guesser.decoder, Decoder)
    text = list(range(5, 45))
    exact = _loss(EngineCore(tiny_model, options(precision="float32")).decoder, text)
    draft, own = (abs(_loss(decoder, text) - exact) for decoder in (core.guesser.decoder, core.decoder))
    assert 5 * draft < own


@CPU
def test_int8_is_gated_and_does_not_depend_on_the_batch(tiny_model: Path) -> None:
    core = EngineCore(tiny_model, options())
    with pytest.raises(ResourceError, match="int8 raises the loss"):
        pack_int8(core.decoder.weights, core.decoder, core.tokenizer, max_increase=-1.0)
    core = EngineCore(tiny_model, options(precision="int8", max_loss_increase=5.0))
    requests = [Request(f"{i}", SHARED[: 5 + 20 * i], replace(GREEDY, max_tokens=30)) for i in range(4)]
    together = tokens(core, requests)
    assert [tokens(core, [r])[0] for r in requests] == together


@pytest.mark.parametrize(
    ("request_", "place"),
    [
        (Request("x", (5,), Sampling(temperature=-1.0)), "temperature"),
        (Request("x", (5,), Sampling(stop=("a",) * 10_000)), "stop"),
        (Request("x", (5,), Sampling(grammar=Grammar("regex", "a" * 300_000))), "grammar"),
        (Request("x", (5,), adapter="nobody"), "adapter"),
        (Request("x", (5,), task="score"), "prompt_logprobs"),
        (Request("x", (5, 6), task="score", prompt_logprobs=0, logprobs_from=0), "logprobs_from"),
    ],
)
def test_requests_that_can_never_run_are_refused(core: EngineCore, request_: Request, place: str) -> None:
    with pytest.raises(DataError) as caught:
        core.add(request_)
    assert caught.value.place == place
    assert len(str(caught.value)) < 500
    assert core.invariants() == []
