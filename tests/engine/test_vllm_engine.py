"""vLLM behind the engine protocol, where vLLM is installed: its CPU build does, in an environment of its own.

python3.11 -m venv .venv-vllm
.venv-vllm/bin/pip install -r tests/benchmarks/requirements-vllm.txt pytest pytest-timeout peft==0.21.2
.venv-vllm/bin/pip uninstall -y torchvision torchaudio torchcodec
PYTHONPATH=platform .venv-vllm/bin/python -m pytest tests/engine/test_vllm_engine.py
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("vllm", reason="vLLM is not installed")
os.environ |= {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}

from test_expert_adapters import reference as adapted
from test_expert_adapters import save_adapter
from test_identity import prompts, reference
from tiny import save_model

from modelyard.engine import EngineOptions, Grammar, Request, Sampling, StepOutput, Tokenizer, generate
from modelyard.engine.checkpoint import read_tensors
from modelyard.engine.protocol import Engine
from modelyard.engine.request import EngineStopped
from modelyard.engine.stepped import Stepped
from modelyard.engine.vllm_engine import VllmEngine
from modelyard.errors import DataError, ModelyardError, ResourceError

OPTIONS = EngineOptions(
    max_sequences=8, precision="float32", threads=1, cache_bytes=64 << 20, backend="vllm", vllm={"enforce_eager": True}
)
GREEDY = Sampling(max_tokens=12, temperature=0.0, ignore_eos=True)


def model(folder: Path, seed: int = 0) -> Path:
    return save_model(folder, seed=seed, head_dim=32)  # vLLM's attention on a CPU knows no narrower heads


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model(tmp_path_factory.mktemp("vllm"))


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[VllmEngine]:
    """One for all tests: a start takes most of a minute. Tests leave it as they found it."""
    made = VllmEngine(folder, OPTIONS)
    yield made
    made.close()


async def whole(engine: Engine, request: Request) -> StepOutput:
    total = StepOutput(())
    async for output in engine.submit(request):
        total = total + output
    return total


def ask(engine: Engine, *requests: Request) -> list[StepOutput]:
    async def every() -> list[StepOutput]:
        return list(await asyncio.gather(*(whole(engine, r) for r in requests)))

    return asyncio.run(every())


def greedy(given: list[list[int]], **changes: Any) -> list[Request]:
    return [Request(f"{i}", tuple(p), GREEDY, **changes) for i, p in enumerate(given)]


def test_greedy_equals_transformers(engine: VllmEngine, folder: Path) -> None:
    assert isinstance(engine, Engine)
    assert (engine.vocabulary, engine.max_length) == (Tokenizer(folder).vocabulary, 256)
    given = prompts(engine.vocabulary, [1, 5, 40, 33, 2])
    before = engine.stats()
    got = ask(engine, *greedy(given))
    assert [list(o.tokens) for o in got] == [reference(folder, p, 12) for p in given]
    assert {o.finish for o in got} == {"length"}
    after = engine.stats()
    assert after.finished_total - before.finished_total == 5
    assert after.output_tokens_total - before.output_tokens_total == 60
    assert after.prompt_tokens_total - before.prompt_tokens_total == 81
    assert after.blocks > 100 and after.block_tokens * after.blocks == after.cache_capacity


def test_text_is_that_of_the_tokens(engine: VllmEngine, folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    (output,) = ask(engine, Request("a", tuple(tokenizer.encode("The scheduler decides")), GREEDY))
    # Bytes that make no character are shown differently.
    texts = [[c for c in text if c.isascii()] for text in (output.text, tokenizer.decode(output.tokens))]
    assert texts[0] == texts[1] != []


def test_a_seed_gives_the_same_answer_beside_others(engine: VllmEngine) -> None:
    seeded = Request("a", tuple(range(9, 29)), Sampling(max_tokens=16, seed=5, temperature=1.5, ignore_eos=True))
    alone = ask(engine, seeded)[0].tokens
    among = ask(engine, *seeded.samples(3), *greedy(prompts(engine.vocabulary, [30, 4])))
    assert among[0].tokens == alone
    assert len({o.tokens for o in among[:3]}) == 3


def test_answers_end_at_stops_and_end_tokens(engine: VllmEngine, folder: Path) -> None:
    free = ask(engine, Request("a", (9, 8, 7), GREEDY))[0]
    stop = free.text[len(free.text) // 2 :][:3]
    cut = ask(engine, Request("a", (9, 8, 7), replace(GREEDY, stop=(stop,))))[0]
    assert (cut.text, cut.finish) == (free.text[: free.text.index(stop)], "stop")
    token = free.tokens[4]
    cut = ask(engine, Request("a", (9, 8, 7), replace(GREEDY, stop_tokens=(token,))))[0]
    assert (cut.tokens, cut.finish) == (free.tokens[: free.tokens.index(token) + 1], "stop")
    ended = ask(engine, Request("a", (9, 8, 7), Sampling(max_tokens=4, temperature=0.0, logit_bias={1: 1000.0})))[0]
    assert (ended.tokens, ended.text, ended.finish) == ((1,), "", "stop")


@torch.no_grad()
def test_logprobs_and_scores_are_the_model_s(engine: VllmEngine, folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    prompt = prompts(engine.vocabulary, [30])[0]
    whole_model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    wanted = whole_model(torch.tensor([prompt])).logits[0].log_softmax(-1)
    (scored,) = asyncio.run(engine.score([prompt], start=9))
    assert scored.logprobs == pytest.approx([wanted[i - 1, prompt[i]].item() for i in range(9, 30)], abs=1e-4)
    asked = replace(GREEDY, logprobs=3, temperature=0.7, seed=1)
    output = ask(engine, Request("a", tuple(prompt), asked, prompt_logprobs=2))[0]
    assert len(output.logprobs) == 12 and len(output.prompt_logprobs) == 29
    first = output.logprobs[0]
    assert first.logprob == pytest.approx(wanted[-1, first.token].item(), abs=1e-4)
    assert [t for t, _ in first.top] == wanted[-1].topk(3).indices.tolist()
    assert [t for t, _ in output.prompt_logprobs[4].top] == wanted[4].topk(2).indices.tolist()


def test_answers_match_their_grammars(engine: VllmEngine) -> None:
    schema = json.dumps({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
    schema = schema[:-1] + ', "additionalProperties": false}'
    kinds = [Grammar("regex", "[ab]{5}"), Grammar("lark", 'start: "yes" | "no"'), Grammar("json_schema", schema)]
    hot = Sampling(max_tokens=60, seed=2)
    got = ask(engine, *(Request(str(i), (9, 8, 7), replace(hot, grammar=g)) for i, g in enumerate(kinds)))
    assert len(got[0].text) == 5 and set(got[0].text) <= {"a", "b"}
    assert got[1].text in ("yes", "no")
    assert got[2].text.startswith('{"a":')
    with pytest.raises(DataError, match="vLLM refuses"):
        ask(engine, Request("x", (9, 8, 7), replace(hot, grammar=Grammar("json_schema", '{"type": 5}'))))
    assert ask(engine, Request("y", (9, 8, 7), GREEDY))[0].finish == "length"


def test_a_request_can_be_aborted_or_left(engine: VllmEngine) -> None:
    long = Request("long", (9, 8, 7), Sampling(max_tokens=200, ignore_eos=True))

    async def run() -> tuple[StepOutput, StepOutput]:
        total = StepOutput(())
        async for output in engine.submit(long):
            total = total + output
            engine.abort("long")
        engine.abort("nobody")
        async with aclosing(engine.submit(long)) as left:
            async for _ in left:
                break
        return total, await whole(engine, Request("long", (9, 8, 7), GREEDY))

    aborted, later = asyncio.run(run())
    assert aborted.finish == "abort" and 0 < len(aborted.tokens) < 200
    assert later.finish == "length"


def test_adapters_answer_as_peft(engine: VllmEngine, folder: Path, tmp_path: Path) -> None:
    save_adapter(folder, tmp_path / "a", 1, target_modules=["q_proj", "v_proj", "down_proj"])
    engine.load_adapter("a", str(tmp_path / "a"))
    with pytest.raises(DataError, match="taken"):
        engine.load_adapter("a", str(tmp_path / "a"))
    given = prompts(engine.vocabulary, [20, 7])
    got = ask(engine, *greedy(given[:1]), *(replace(r, id=r.id + "a") for r in greedy(given, adapter="a")))
    assert list(got[0].tokens) == reference(folder, given[0], 12)
    assert [o.tokens for o in got[1:]] == adapted(folder, tmp_path / "a", given)
    assert engine.stats().adapters == ("a",)
    engine.unload_adapter("a")
    with pytest.raises(DataError, match="not loaded"):
        ask(engine, *greedy(given, adapter="a"))
    with pytest.raises(DataError, match="no adapter_config"):
        engine.load_adapter("a", str(folder))
    wide = save_model(tmp_path / "wide", head_dim=32, hidden_size=96)
    save_adapter(wide, tmp_path / "wrong", 1, target_modules=["q_proj"])
    with pytest.raises(DataError, match="vLLM refuses the adapter"):
        engine.load_adapter("a", str(tmp_path / "wrong"))


def test_new_weights_reach_running_requests(engine: VllmEngine, folder: Path, tmp_path: Path) -> None:
    other = model(tmp_path / "other", seed=1)
    prompt = prompts(engine.vocabulary, [20])[0]

    async def run() -> StepOutput:
        total = StepOutput(())
        async for output in engine.submit(Request("a", tuple(prompt), replace(GREEDY, max_tokens=100))):
            if not total.tokens:
                await asyncio.to_thread(engine.pause)
                assert engine.stats().paused
                await asyncio.to_thread(engine.update_weights, read_tensors(other), 3)
                await asyncio.to_thread(engine.resume)
            total = total + output
        return total

    spans = asyncio.run(run())
    assert (len(spans.tokens), spans.weights_first, spans.weights) == (100, 0, 3)
    after = ask(engine, Request("b", tuple(prompt), GREEDY))[0]
    assert list(after.tokens) == reference(other, prompt, 12)
    assert (after.weights_first, after.weights, engine.stats().weights) == (3, 3, 3)
    with pytest.raises(DataError, match="no place"):
        engine.update_weights([("nobody.weight", torch.zeros(3))], 4)
    with pytest.raises(DataError, match="missing, first lm_head"):
        engine.update_weights([t for t in read_tensors(other) if "layers" in t[0]], 4)
    assert engine.stats().weights == 3
    engine.update_weights(read_tensors(folder), 5)
    assert list(ask(engine, Request("c", tuple(prompt), GREEDY))[0].tokens) == reference(folder, prompt, 12)
    engine._replaced.clear()


def test_what_an_update_leaves_out_is_the_folder_s(engine: VllmEngine, folder: Path, tmp_path: Path) -> None:
    other, mixed = model(tmp_path / "other", seed=1), tmp_path / "mixed"
    shutil.copytree(folder, mixed)
    some = [t for t in read_tensors(other) if "q_proj" in t[0]]
    save_file(dict(read_tensors(folder)) | dict(some), mixed / "model.safetensors", {"format": "pt"})
    engine.update_weights(some, 6)
    given = prompts(engine.vocabulary, [20, 7])
    assert [list(o.tokens) for o in ask(engine, *greedy(given))] == [reference(mixed, p, 12) for p in given]
    engine.update_weights([t for t in read_tensors(folder) if "q_proj" in t[0]], 7)
    assert [list(o.tokens) for o in ask(engine, *greedy(given))] == [reference(folder, p, 12) for p in given]


def test_whoever_steps_it_gets_what_steps_give(engine: VllmEngine, folder: Path) -> None:
    core = Stepped(engine, folder, OPTIONS)
    given = prompts(engine.vocabulary, [9] * 11)
    got = generate(core, greedy(given))
    assert [list(c.output.tokens) for c in got] == [reference(folder, p, 12) for p in given]
    core.add(Request("a", tuple(given[0]), replace(GREEDY, max_tokens=200)))
    assert core.busy and core.step()[0][0] == "a"
    core.abort("a")
    assert not core.busy and core.step() == []
    with pytest.raises(DataError, match="empty"):
        core.add(Request("a", ()))
    again = generate(core, [Request("a", tuple(given[0]), GREEDY)])  # the name of one that was aborted
    assert list(again[0].output.tokens) == reference(folder, given[0], 12)
    assert engine.invariants() == [] and core.end_tokens == (1,) and core.version == engine.stats().weights


def test_its_processes_end_with_a_killed_owner(folder: Path) -> None:
    script = (
        "import sys, time; from modelyard.engine import EngineOptions; from modelyard.engine.choose import start\n"
        "if __name__ == '__main__':\n"
        "    engine = start(sys.argv[1], EngineOptions.model_validate_json(sys.argv[2]))\n"
        "    print('ready', flush=True); time.sleep(600)\n"
    )
    command = [sys.executable, "-c", script, str(folder), OPTIONS.model_dump_json()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        assert any(line == "ready\n" for line in owner.stdout)
        started = psutil.Process(owner.pid).children(recursive=True)
        owner.kill()
        _, left = psutil.wait_procs(started, timeout=30)
    assert len(started) >= 2 and not left


def test_what_cannot_be_is_refused_by_name(engine: VllmEngine, folder: Path) -> None:
    for request, says in (
        (Request("a", (), GREEDY), "empty"),
        (Request("a", (1,) * 256, GREEDY), "256"),
        (Request("a", (10**6,), GREEDY), "vocabulary"),
        (Request("a", (5,), replace(GREEDY, temperature=-1.0)), "temperature"),
        (Request("a", (5,), task="embed"), "to answer or to embed"),
        (Request("a", (5,), adapter="nobody"), "not loaded"),
    ):
        with pytest.raises(DataError, match=says):
            ask(engine, request)
    for device in ("cpu", "cuda"):
        if device != engine._engine.vllm_config.device_config.device_type:
            with pytest.raises(ResourceError, match=f"compute on '{device}'"):
                VllmEngine(folder, OPTIONS.model_copy(update={"device": device}))


@torch.no_grad()
def test_an_engine_started_to_embed(folder: Path) -> None:
    from transformers import AutoModel

    engine = VllmEngine(folder, OPTIONS, embeds="mean")
    try:
        given = prompts(engine.vocabulary, [30, 3])
        got = asyncio.run(engine.embed(given))
        body = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
        for vector, prompt in zip(got, given, strict=True):
            mean = body(torch.tensor([prompt])).last_hidden_state[0].mean(0)
            assert list(vector) == pytest.approx(torch.nn.functional.normalize(mean, dim=0).tolist(), abs=1e-4)
        for request in (Request("a", (5, 6), GREEDY), Request("a", (5, 6), task="embed", pooling="last")):
            with pytest.raises(DataError):
                ask(engine, request)
    finally:
        engine.close()
    with pytest.raises(EngineStopped):
        ask(engine, Request("a", (5, 6), task="embed"))
    with pytest.raises(ModelyardError):
        VllmEngine(folder, OPTIONS.model_copy(update={"max_length": 10**9}))
