"""The step loop: endings, seeds, weights, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import psutil
import pytest
import torch
from marks import CPU
from safetensors.torch import load_file, save_file
from tiny import save_model

from modelyard.engine import EngineCore, EngineOptions, Request, Sampling, generate
from modelyard.engine.checkpoint import read_config, read_tensors
from modelyard.engine.options import Precision
from modelyard.errors import DataError, ResourceError

GREEDY = Sampling(max_tokens=12, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def core(tiny_model: Path) -> EngineCore:
    return EngineCore(tiny_model, EngineOptions(max_sequences=4, step_tokens=16))


def one(
    core: EngineCore, sampling: Sampling, prompt: tuple[int, ...] = (9, 8, 7)
) -> tuple[tuple[int, ...], str, str | None]:
    output = generate(core, [Request("one", prompt, sampling)])[0].output
    return output.tokens, output.text, output.finish


def test_length_ends_an_answer(core: EngineCore) -> None:
    tokens, text, finish = one(core, GREEDY)
    assert (len(tokens), finish) == (12, "length")
    assert core.tokenizer is not None
    assert text == core.tokenizer.decode(tokens)


def test_the_context_bounds_an_answer(core: EngineCore) -> None:
    tokens, _, finish = one(core, Sampling(max_tokens=10_000, temperature=0.0, ignore_eos=True), (5,) * 250)
    assert (len(tokens), finish) == (6, "length")


def test_stop_tokens_end_an_answer(core: EngineCore) -> None:
    tokens, _, _ = one(core, GREEDY)
    stopped, _, finish = one(core, Sampling(max_tokens=12, temperature=0.0, ignore_eos=True, stop_tokens=(tokens[4],)))
    assert finish == "stop"
    assert stopped == tokens[: tokens.index(tokens[4]) + 1]


def test_stop_strings_end_an_answer(core: EngineCore) -> None:
    _, text, _ = one(core, GREEDY)
    stop = text[2:5]
    _, cut, finish = one(core, Sampling(max_tokens=12, temperature=0.0, ignore_eos=True, stop=(stop,)))
    assert finish == "stop"
    assert cut == text[: text.index(stop)]


def test_a_seed_repeats_whatever_the_batch_mates(core: EngineCore) -> None:
    seeded = Sampling(max_tokens=20, temperature=1.0, seed=5, ignore_eos=True)
    alone = one(core, seeded)[0]
    mates = [Request(f"m{i}", (i + 5,) * (i * 9 + 1), Sampling(max_tokens=5 + 3 * i, top_p=0.9)) for i in range(6)]
    for position in (0, 3, 6):
        batch = [*mates[:position], Request("one", (9, 8, 7), seeded), *mates[position:]]
        found = next(c for c in generate(core, batch) if c.request.id == "one")
        assert found.output.tokens == alone
    other = one(core, Sampling(max_tokens=20, temperature=1.0, seed=6, ignore_eos=True))[0]
    assert other != alone


def test_abort_frees_the_slot_running_and_waiting(core: EngineCore) -> None:
    for i in range(7):
        core.add(Request(str(i), (5, 6, 7), GREEDY))
    core.step()
    core.step()
    for i in (1, 6, 3):
        aborted = core.abort(str(i))
        assert aborted is not None
        assert aborted.finish == "abort"
        assert core.invariants() == []
    assert core.abort("1") is None
    survivors: dict[str, list[int]] = {}
    while core.busy:
        for name, output in core.step():
            survivors.setdefault(name, []).extend(output.tokens)
        assert core.invariants() == []
    assert set(survivors) == {"0", "2", "4", "5"}
    assert core.scheduler.slots.used == 0
    expected = list(one(core, GREEDY, (5, 6, 7))[0])
    assert survivors["4"] == expected
    assert survivors["0"] == expected[2:]


def test_update_weights_changes_answers_and_versions(tiny_model: Path, tmp_path: Path) -> None:
    core = EngineCore(tiny_model, EngineOptions(max_sequences=2))
    other = save_model(tmp_path / "other", seed=1)
    before = one(core, GREEDY)[0]
    expected = one(EngineCore(other, EngineOptions(max_sequences=2)), GREEDY)[0]
    core.update_weights(read_tensors(other), version=7)
    output = generate(core, [Request("a", (9, 8, 7), GREEDY)])[0].output
    assert output.tokens == expected != before
    assert output.weights == 7


def test_update_weights_recomputes_what_was_cached(tiny_model: Path, tmp_path: Path) -> None:
    core = EngineCore(tiny_model, EngineOptions(max_sequences=2))
    core.add(Request("a", (9, 8, 7), GREEDY))
    tokens = [t for _ in range(4) for _, o in core.step() for t in o.tokens]
    other = save_model(tmp_path / "other", seed=1)
    core.update_weights(read_tensors(other), version=1)
    rest = []
    while core.busy:
        rest += [t for _, o in core.step() for t in o.tokens]
    fresh = EngineCore(other, EngineOptions(max_sequences=2))
    sampling = Sampling(max_tokens=8, temperature=0.0, ignore_eos=True)
    assert tuple(rest) == one(fresh, sampling, (9, 8, 7, *tokens))[0]


@pytest.mark.parametrize("precision", ["float16_packed", "bfloat16"])
def test_packed_weights_can_be_updated_in_part(tiny_model: Path, precision: Precision) -> None:
    core = EngineCore(tiny_model, EngineOptions(max_sequences=1, precision=precision))
    before = one(core, GREEDY)[0]
    tensors = dict(read_tensors(tiny_model))
    name = "model.layers.0.self_attn.k_proj.weight"
    core.update_weights([(name, torch.zeros_like(tensors[name]))], version=1)
    core.update_weights([(name, tensors[name])], version=2)
    assert one(core, GREEDY)[0] == before


@CPU
def test_memory_is_used_as_sequences_grow(tiny_model: Path) -> None:
    """128 MiB of slots and as much of the prefix store cost nothing until somebody fills them."""
    before = psutil.Process().memory_info().rss
    core = EngineCore(tiny_model, EngineOptions(max_sequences=1024, max_length=256, cache_tokens=262_144))
    assert core.stats().cache_capacity * core.config.cache_bytes_per_token == 2**27
    assert psutil.Process().memory_info().rss - before < 2**26


def test_a_model_that_yields_nan_fails_the_request_and_spoils_no_other(tiny_model: Path) -> None:
    core = EngineCore(tiny_model, EngineOptions(max_sequences=2))
    good = one(core, GREEDY)[0]
    name = "model.embed_tokens.weight"
    weights = dict(read_tensors(tiny_model))[name].clone()
    weights[300] = torch.nan
    core.update_weights([(name, weights)], version=1)
    bad, fine = generate(core, [Request("bad", (300, 5), GREEDY), Request("fine", (9, 8, 7), GREEDY)])
    assert bad.output.finish == "error"
    assert "not finite" in bad.output.error
    assert fine.output.tokens == good
    assert one(core, GREEDY)[0] == good


@pytest.mark.parametrize(
    ("request_", "place"),
    [
        (Request("x", ()), "prompt"),
        (Request("x", (5,) * 256), "prompt"),
        (Request("x", (10_000,)), "prompt"),
        (Request("x", (-1,)), "prompt"),
        (Request("x", (5,), Sampling(max_tokens=0)), "max_tokens"),
    ],
)
def test_requests_that_can_never_run_are_refused(core: EngineCore, request_: Request, place: str) -> None:
    with pytest.raises(DataError) as caught:
        core.add(request_)
    assert caught.value.place == place
    assert not core.busy


def test_a_full_queue_refuses(tiny_model: Path) -> None:
    core = EngineCore(tiny_model, EngineOptions(max_sequences=1, max_waiting=2))
    for i in range(3):
        core.add(Request(str(i), (5,), GREEDY))
    with pytest.raises(ResourceError, match="waiting"):
        core.add(Request("3", (5,), GREEDY))


@CPU
def test_a_cache_that_cannot_fit_is_refused_before_loading(tiny_model: Path) -> None:
    with pytest.raises(ResourceError, match="key/value cache needs"):
        EngineCore(tiny_model, EngineOptions(cache_bytes=1000))


@CPU
def test_a_length_nobody_asked_for_is_cut_to_memory(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m", max_position_embeddings=16_384)
    token = read_config(folder).cache_bytes_per_token
    options = EngineOptions(max_sequences=4, cache_bytes=20_000 * token)
    core = EngineCore(folder, options)
    assert 3_900 < core.max_length < 4_000, "four slots and a sequence in the store"
    with pytest.raises(DataError, match=f"the model takes {core.max_length}"):
        core.add(Request("a", (5,) * 4_000, GREEDY))
    with pytest.raises(ResourceError, match="key/value cache needs"):
        EngineCore(folder, options.model_copy(update={"max_length": 16_384}))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "modeling_x.py", "weights.pt", "state.pkl"])
def test_folders_with_what_could_execute_are_refused_by_name(tiny_model: Path, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "m")
    (folder / name).write_bytes(b"")
    with pytest.raises(DataError, match=name):
        EngineCore(folder)


def test_remote_code_is_refused_by_name(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "x.Y"}}))
    with pytest.raises(DataError, match="auto_map"):
        EngineCore(folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"architectures": ["BloomForCausalLM"]}, "BloomForCausalLM"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "longrope"),
        ({"hidden_size": None}, "config.json"),
        ({"intermediate_size": 100}, "shape"),
        ({"num_hidden_layers": 3}, "missing"),
        ({"num_hidden_layers": 1}, "no place"),
    ],
)
def test_a_config_that_does_not_fit_is_explained(
    tiny_model: Path, tmp_path: Path, change: dict[str, object], says: str
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(DataError, match=says):
        EngineCore(folder)


def test_damaged_and_absent_weights_are_explained(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if "norm" not in k}, folder / "model.safetensors")
    with pytest.raises(DataError, match="missing"):
        EngineCore(folder)
    (folder / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(DataError, match="cannot read"):
        EngineCore(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(DataError, match="has no"):
        EngineCore(folder)
    with pytest.raises(DataError, match="not a model folder"):
        EngineCore(tmp_path)
