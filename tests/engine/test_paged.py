"""The GPU decoder's logic where no GPU is: layouts, gathered attention, and whole answers on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from marks import CPU
from test_identity import ARCHITECTURES, answers, prompts
from tiny import save_model

from modelyard.engine import EngineCore, EngineOptions, Request, Sampling, generate
from modelyard.engine import build as build
from modelyard.engine.cache import NoStore
from modelyard.engine.checkpoint import read_tensors
from modelyard.engine.options import Speculation
from modelyard.engine.paged import PagedDecoder
from modelyard.engine.paged_layout import Staging, gathered
from modelyard.engine.scheduler import Piece, Sequence
from modelyard.engine.weights import dense_weights
from modelyard.errors import RecipeError, ResourceError

OPTIONS = EngineOptions(max_sequences=3, step_tokens=17, threads=1, precision="float32", block_tokens=4)


def paged(folder: Path) -> EngineCore:
    """An engine whose decoder keeps keys and values in blocks, on the CPU."""
    core = EngineCore(folder, OPTIONS)
    weights = dense_weights(core.config, torch.device("cpu"), torch.float32)  # type: ignore[arg-type]
    weights.load(read_tensors(folder), "test")
    core.decoder = PagedDecoder(weights, core.scheduler.blocks.count, 4, core.max_length)
    core._cache = NoStore()
    return core


@pytest.mark.parametrize("name", ["llama-biases", "qwen3", "mistral-window", "gpt2", "smollm3", "mixtral"])
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


def two_pieces() -> list[Piece]:
    """One token at position 5 of a sequence, and six from position 3 of another."""
    return [Piece(sequence(6, [5, 2], 5), 5, 1), Piece(sequence(9, [0, 7, 3], 3), 3, 6)]


def test_a_layout_says_where_tokens_lie() -> None:
    staging = Staging(torch.device("cpu"), 4, 5, 36, lambda most: 4)
    layout = staging.place(staging.pack(two_pieces()))
    assert layout.tokens.tolist() == [5, 3, 4, 5, 6, 7, 8]
    assert layout.positions.tolist() == [5, 3, 4, 5, 6, 7, 8]
    assert layout.mapping.tolist() == [9, 3, 28, 29, 30, 31, 12]
    assert layout.tables.tolist() == [[5, 2, 0], [0, 7, 3]]
    assert (layout.starts.tolist(), layout.lengths.tolist()) == ([0, 1, 7], [6, 9])
    assert (layout.owners.tolist(), layout.firsts.tolist()) == ([0, 1, 1], [0, 0, 4])
    assert (layout.longest, layout.most, layout.tile) == (9, 6, 4)


def test_a_fixed_layout_fills_up_with_spare_tokens() -> None:
    staging = Staging(torch.device("cpu"), 4, 5, 36, lambda most: 1)
    packed = staging.pack(two_pieces()[:1], 3)
    place = torch.full_like(packed.buffer, -1)
    held = staging.place(packed, place)
    assert held.tokens.data_ptr() == place.data_ptr(), "a graph reads it where it was captured"
    assert (held.tokens.tolist(), held.positions.tolist(), held.mapping.tolist()) == ([5, 0, 0], [5, 0, 0], [9, 36, 36])
    assert held.tables.tolist() == [[5, 2, 9, 9, 9], [9] * 5, [9] * 5]
    assert (held.lengths.tolist(), held.starts.tolist()) == ([6, 1, 1], [0, 1, 2, 3])
    assert (held.owners.tolist(), held.firsts.tolist()) == ([0, 1, 2], [0, 0, 0])


@pytest.mark.parametrize("window", [0, 3])
def test_gathered_attention_is_attention(window: int) -> None:
    torch.manual_seed(0)
    pieces = two_pieces()
    staging = Staging(torch.device("cpu"), 4, 5, 36, lambda most: most)
    layout = staging.place(staging.pack(pieces))
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


@CPU
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu_is_refused(tiny_model: Path) -> None:
    options: dict[str, Any] = {"device": "cuda"}
    with pytest.raises(ResourceError, match="no CUDA device"):
        EngineCore(tiny_model, OPTIONS.model_copy(update=options))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"precision": "int8"}, "the CPU's"),
        ({"speculation": Speculation(method="draft_model", model="small")}, "draft model"),
        ({"cache_bytes": 1000}, "blocks of 4 tokens"),
    ],
)
def test_what_a_gpu_cannot_do_is_refused(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], says: str
) -> None:
    monkeypatch.setattr(build, "gpu", lambda: torch.device("cpu"))
    with pytest.raises(ResourceError, match=says):
        EngineCore(tiny_model, OPTIONS.model_copy(update={"device": "cuda", **changes}))


def test_a_process_uses_the_gpus_it_was_given() -> None:
    options = EngineOptions()
    assert (options.placed(0).device, options.placed(1).device) == ("cpu", "cuda")
    assert EngineOptions(device="cpu").placed(1).device == "cpu"
    with pytest.raises(RecipeError, match="cut over 4 GPUs, the replica has 2"):
        EngineOptions(tensor_parallel=4).placed(2)
