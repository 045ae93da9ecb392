"""LoRA adapters: many in one batch, each answer that of its merged model; adapters that do not fit are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import save_model
from transformers import AutoModelForCausalLM

from modelyard.engine import EngineCore, EngineOptions, Request, Sampling, generate
from modelyard.errors import DataError

GREEDY = Sampling(max_tokens=16, temperature=0.0, ignore_eos=True)
PROMPTS = [tuple(range(5 + i, 45 + 2 * i)) for i in range(3)]
OPTIONS = EngineOptions(max_sequences=8, step_tokens=48, threads=1, precision="float32")
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def save_adapter(base: Path, folder: Path, merged: Path, seed: int, **changes: Any) -> None:
    """A random adapter in PEFT's form, and the base with the adapter merged."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(**({"r": 4, "lora_alpha": 16, "task_type": "CAUSAL_LM"} | changes))
    adapted = get_peft_model(model, config)
    for name, value in adapted.named_parameters():
        if "lora_" in name:
            value.data = torch.randn_like(value) * 0.3
    adapted.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    whole = adapted.merge_and_unload()
    whole.save_pretrained(merged)
    shutil.copy(base / "tokenizer.json", merged)


@pytest.fixture(scope="module")
def adapters(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    root = tmp_path_factory.mktemp("adapters")
    kinds: dict[str, dict[str, Any]] = {
        "all": {"target_modules": ALL},
        "values": {"target_modules": ["v_proj"], "r": 2},
        "stable": {"target_modules": ["q_proj", "down_proj"], "use_rslora": True, "alpha_pattern": {"q_proj": 2}},
    }
    for seed, (name, changes) in enumerate(kinds.items()):
        save_adapter(tiny_model, root / name, root / f"{name}-merged", seed, **changes)
    return {name: (root / name, root / f"{name}-merged") for name in kinds}


def answers(core: EngineCore, requests: list[Request]) -> list[tuple[int, ...]]:
    found = [c.output.tokens for c in generate(core, requests)]
    assert core.invariants() == []
    return found


def test_each_answer_is_that_of_its_merged_model(tiny_model: Path, adapters: dict[str, tuple[Path, Path]]) -> None:
    core = EngineCore(tiny_model, OPTIONS)
    for name, (folder, _) in adapters.items():
        core.load_adapter(name, folder)
    names = [None, *adapters]
    requests = [Request(f"{n}-{i}", p, GREEDY, adapter=n) for i, p in enumerate(PROMPTS) for n in names]
    got = dict(zip((r.id for r in requests), answers(core, requests), strict=True))
    for name in names:
        whole = EngineCore(tiny_model if name is None else adapters[name][1], OPTIONS)
        expected = answers(whole, [Request(f"{name}-{i}", p, GREEDY) for i, p in enumerate(PROMPTS)])
        assert [got[f"{name}-{i}"] for i in range(len(PROMPTS))] == expected, name
    assert len({got[f"{n}-0"] for n in names}) == len(names), "the prefix cache keeps adapters apart"
    assert core.stats().adapters == tuple(adapters)


def test_a_name_can_be_used_again_and_forgets_what_was_cached(
    tiny_model: Path, adapters: dict[str, tuple[Path, Path]]
) -> None:
    core = EngineCore(tiny_model, OPTIONS)
    core.load_adapter("a", adapters["all"][0])
    first = answers(core, [Request("1", PROMPTS[0], GREEDY, adapter="a")])
    with pytest.raises(DataError, match="taken"):
        core.load_adapter("a", adapters["values"][0])
    core.unload_adapter("a")
    with pytest.raises(DataError, match="not loaded"):
        core.add(Request("x", PROMPTS[0], GREEDY, adapter="a"))
    with pytest.raises(DataError, match="not loaded"):
        core.unload_adapter("a")
    core.load_adapter("a", adapters["values"][0])
    assert answers(core, [Request("2", PROMPTS[0], GREEDY, adapter="a")]) != first


def test_adapters_that_do_not_fit_are_refused(
    tiny_model: Path, adapters: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    core = EngineCore(tiny_model, OPTIONS)
    wide = save_model(tmp_path / "wide", hidden_size=96)
    with pytest.raises(DataError, match="the base's"):
        EngineCore(wide, OPTIONS).load_adapter("a", adapters["all"][0])
    gpt2 = save_model(tmp_path / "gpt2", "gpt2", n_embd=64, n_layer=2, n_head=4, n_positions=256)
    with pytest.raises(DataError, match="cannot adapt"):
        EngineCore(gpt2, OPTIONS).load_adapter("a", adapters["all"][0])
    for change, says in (
        ({"peft_type": "IA3"}, "IA3"),
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "biases"),
    ):
        folder = shutil.copytree(adapters["values"][0], tmp_path / says)
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(DataError, match=says):
            core.load_adapter("a", folder)
    pickled = shutil.copytree(adapters["values"][0], tmp_path / "pickled")
    (pickled / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(DataError, match=r"adapter_model\.bin"):
        core.load_adapter("a", pickled)
    with pytest.raises(DataError, match="no adapter_config"):
        core.load_adapter("a", tmp_path)
    assert core.adapters == {}


def test_gpt2_takes_adapters_of_its_transposed_matrices(tmp_path: Path) -> None:
    base = save_model(tmp_path / "gpt2", "gpt2", n_embd=64, n_layer=2, n_head=4, n_positions=256)
    save_adapter(base, tmp_path / "a", tmp_path / "merged", 3, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    core = EngineCore(base, OPTIONS)
    core.load_adapter("a", tmp_path / "a")
    requests = [Request(str(i), p, GREEDY, adapter="a") for i, p in enumerate(PROMPTS)]
    plain = [Request(str(i), p, GREEDY) for i, p in enumerate(PROMPTS)]
    assert answers(core, requests) == answers(EngineCore(tmp_path / "merged", OPTIONS), plain)
