"""The GPU decoder's logic where no GPU is: layouts, gathered attention, and whole answers on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_identity import ARCHITECTURES, answers, prompts
from tiny import save_model

from modelyard.engine import EngineCore, EngineOptions, Request, Sampling, generate
from modelyard.engine.cache import NoStore
from modelyard.engine.checkpoint import read_tensors
from modelyard.engine.paged import PagedDecoder, gathered, lay_out_blocks
from modelyard.engine.scheduler import Piece, Sequence
from modelyard.engine.weights import Weights
from modelyard.errors import ResourceError

OPTIONS = EngineOptions(max_sequences=3, step_tokens=17, threads=1, precision="float32", block_tokens=4)


def paged(folder: Path) -> EngineCore:
    """An engine whose decoder keeps keys and values in blocks, on the CPU."""
    core = EngineCore(folder, OPTIONS)
    weights = Weights(core.config, "float32")  # type: ignore[arg-type]
    weights.load(read_tensors(folder), "test")
    blocks = core.scheduler.blocks.count
    core.decoder = PagedDecoder(weights, blocks, 4, core.max_length, torch.device("cpu"), torch.float32)
    core._cache = NoStore()
    return core


@pytest.mark.parametrize("name", ["llama-biases", "qwen3", "mistral-window", "gpt2", "smollm3"])
def test_answers_over_blocks_are_those_over_slots(name: str, tmp_path: Path) -> None:
    family, overrides = ARCHITECTURES[name]
    folder = save_model(tmp_path / name, family, **overrides)
    core = paged(folder)
    given = prompts(core.config.vocabulary, [1, 5, 40, 33, 2])
    expected = answers(EngineCore(folder, OPTIONS), given, 24)
    assert answers(core, given, 24) == expected
    assert answers(core, given, 24) == expected, "behind shared blocks, not copied"
    assert core.stats().prefix_hit_tokens_total > 60
    assert core.invariants() == []


def test_new_weights_reach_the_device(tiny_model: Path, tmp_path: Path) -> None:
    core, other = paged(tiny_model), save_model(tmp_path / "other", seed=1)
    core.update_weights(read_tensors(other), version=1)
    request = Request("a", (9, 8, 7), Sampling(max_tokens=9, temperature=0.0, ignore_eos=True))
    expected = generate(EngineCore(other, OPTIONS), [request])[0].output.tokens
    assert generate(core, [request])[0].output.tokens == expected


def sequence(tokens: int, blocks: list[int], computed: int) -> Sequence:
    request = Request("a", tuple(range(tokens)))
    return Sequence(request, 0, 0.0, list(range(tokens)), 0, 1, blocks=blocks, computed=computed)


def test_a_layout_says_where_tokens_lie() -> None:
    pieces = [Piece(sequence(6, [5, 2], 5), 5, 1), Piece(sequence(9, [0, 7, 3], 3), 3, 6)]
    layout = lay_out_blocks(pieces, 4)
    assert layout.mapping.tolist() == [9, 3, 28, 29, 30, 31, 12]
    assert layout.tables.tolist() == [[5, 2, 0], [0, 7, 3]]
    assert (layout.starts.tolist(), layout.lengths.tolist()) == ([0, 1, 7], [6, 9])
    assert (layout.longest, layout.most) == (9, 6)


@pytest.mark.parametrize("window", [0, 3])
def test_gathered_attention_is_attention(window: int) -> None:
    torch.manual_seed(0)
    pieces = [Piece(sequence(6, [5, 2], 5), 5, 1), Piece(sequence(9, [0, 7, 3], 3), 3, 6)]
    layout = lay_out_blocks(pieces, 4)
    q, keys, values = torch.randn(7, 4, 8), torch.randn(32, 2, 8), torch.randn(32, 2, 8)
    got = gathered(q, keys, values, layout, 4, window)
    row = 0
    for piece in pieces:
        for position in range(piece.start, piece.start + piece.count):
            first = max(0, position + 1 - window) if window else 0
            places = [piece.sequence.blocks[p // 4] * 4 + p % 4 for p in range(first, position + 1)]
            for head in range(4):
                weights = (keys[places, head // 2] @ q[row, head] / 8**0.5).softmax(0)
                assert torch.allclose(got[row, head], weights @ values[places, head // 2], atol=1e-5)
            row += 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu_is_refused(tiny_model: Path) -> None:
    options: dict[str, Any] = {"device": "cuda"}
    with pytest.raises(ResourceError, match="no CUDA device"):
        EngineCore(tiny_model, OPTIONS.model_copy(update=options))
