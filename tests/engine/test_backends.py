"""The transformers backend answers as the native one does, and runs architectures the native one does not know."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_identity import prompts, reference
from tiny import save_model

from modelyard.engine import EngineCore, EngineOptions, Request, Sampling, generate
from modelyard.engine.checkpoint import read_tensors
from modelyard.errors import DataError

NATIVE = EngineOptions(max_sequences=3, threads=1, precision="float32")
OTHER = NATIVE.model_copy(update={"backend": "transformers"})
GREEDY = Sampling(max_tokens=12, temperature=0.0, ignore_eos=True)


def test_both_backends_answer_score_and_embed_alike(tiny_model: Path) -> None:
    native, other = EngineCore(tiny_model, NATIVE), EngineCore(tiny_model, OTHER)
    given = [tuple(p) for p in prompts(native.config.vocabulary, [1, 30, 7, 12, 5])]
    requests = [Request(f"g{i}", p, replace(GREEDY, max_tokens=4 + 3 * i)) for i, p in enumerate(given)]
    requests += [Request("warm", given[1], Sampling(max_tokens=9, seed=4, top_p=0.8, ignore_eos=True))]
    assert [c.output for c in _still(native, requests)] == [c.output for c in _still(other, requests)]
    score = Request("s", given[1], task="score", prompt_logprobs=0, logprobs_from=9)
    embed = Request("e", given[1], task="embed")
    (s1, e1), (s2, e2) = ([c.output for c in generate(core, [score, embed])] for core in (native, other))
    assert [p.logprob for p in s1.prompt_logprobs] == pytest.approx([p.logprob for p in s2.prompt_logprobs], abs=1e-4)
    assert e1.embedding == pytest.approx(e2.embedding, abs=1e-5)
    assert other.invariants() == []
    assert other.scheduler.slots.used == other.scheduler.blocks.used == 0


def _still(core: EngineCore, requests: list[Request]) -> list:
    """Answers without what depends on the clock or the backend."""
    found = generate(core, requests)
    return [replace(c, output=replace(c.output, waited=0.0, cached=0)) for c in found]


def test_an_architecture_the_native_decoder_does_not_know(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "neox", "gpt_neox", hidden_act="gelu", use_parallel_residual=False)
    with pytest.raises(DataError, match="GPTNeoX"):
        EngineCore(folder, NATIVE)
    core = EngineCore(folder, OTHER)
    given = prompts(core.config.vocabulary, [3, 20, 9, 11])
    got = [
        list(c.output.tokens) for c in generate(core, [Request(str(i), tuple(p), GREEDY) for i, p in enumerate(given)])
    ]
    assert got == [reference(folder, p, 12) for p in given]


def test_weights_and_adapters_of_the_other_backend(tiny_model: Path, tmp_path: Path) -> None:
    core = EngineCore(tiny_model, OTHER)
    other = save_model(tmp_path / "other", seed=1)
    core.update_weights(read_tensors(other), version=2)
    request = Request("a", (9, 8, 7), GREEDY)
    output = generate(core, [request])[0].output
    assert output.tokens == generate(EngineCore(other, NATIVE), [request])[0].output.tokens
    assert output.weights == 2
    with pytest.raises(DataError, match="no place"):
        core.update_weights([("nonsense", torch.zeros(1))], version=3)
