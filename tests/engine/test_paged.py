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
from modelyard.engine.paged import PagedDecoder
from modelyard.engine.paged_layout import Staging, gathered
from modelyard.engine.scheduler import Piece, Sequence
from modelyard.engine.weights import dense_weights
from modelyard.errors import RecipeError, ResourceError

OPTIONS = EngineOptions(max_sequences=3, step_tokens=17, threads=1, precision="float32", block_tokens=4)


def paged(folder: Path, dtype: torch.dtype = torch.float32, *, fp8: bool = False) -> EngineCore:
    """An engine whose decoder keeps keys and values in blocks, on the CPU."""
    core = EngineCore(folder, OPTIONS)
    weights = dense_weights(core.config, torch.device("cpu"), dtype)  # type: ignore[arg-type]
    weights.load(read_tensors(folder), "test")
    core.decoder = PagedDecoder(weights, core.scheduler.blocks.count, 4, core.max_length, fp8=fp8)
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


def logprobs(core: EngineCore, given: list[list[int]]) -> torch.Tensor:
    """Log-probabilities of prompts whose keys and values are written in several steps and read in later ones."""
    asked = [Request(str(i), tuple(p), task="score", prompt_logprobs=0) for i, p in enumerate(given)]
    return torch.tensor([t.logprob for c in generate(core, asked) for t in c.output.prompt_logprobs])


def test_fp8_keys_and_values_change_little(tmp_path: Path) -> None:
    """A token's log-probability moves by three times what bfloat16 itself moves it."""
    folder = save_model(tmp_path / "a", "qwen3", head_dim=16, initializer_range=0.1)
    exact, half, small = paged(folder), paged(folder, torch.bfloat16), paged(folder, torch.bfloat16, fp8=True)
    given = prompts(exact.config.vocabulary, [60, 33, 90])
    wanted, rounded, got = (logprobs(core, given) for core in (exact, half, small))
    assert 0 < (got - rounded).abs().mean() < 0.06  # 0.030 measured
    assert (got - wanted).abs().mean() < 6 * (rounded - wanted).abs().mean()  # 3.0 times measured
    shared = Request("shared", tuple(given[2]), task="score", prompt_logprobs=0, logprobs_from=41)
    again = torch.tensor([t.logprob for t in generate(small, [shared])[0].output.prompt_logprobs])
    assert small.stats().prefix_hit_tokens_total >= 40
    assert (again - got[-len(again) :]).abs().mean() < 0.03, "behind blocks of another request"
    assert small.invariants() == []


def test_blocks_are_counted_in_bytes(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """2 layers x 2 x 2 heads of 16 numbers: float32, or e4m3 and a float32 scale."""
    monkeypatch.setattr(build, "gpu", lambda: torch.device("cpu"))
    changes = {"device": "cuda", "cache_bytes": 300 * 4 * 8 * 64, "max_sequences": 64}
    plain = EngineCore(tiny_model, OPTIONS.model_copy(update=changes))
    small = EngineCore(tiny_model, OPTIONS.model_copy(update=changes | {"kv_precision": "fp8"}))
    assert plain.scheduler.blocks.count == 300
    assert small.scheduler.blocks.count == 300 * 64 // (16 + 4)
    assert isinstance(small.decoder, PagedDecoder)
    held = small.decoder._pool.nbytes + (small.decoder._scales.nbytes if small.decoder._scales is not None else 0)
    assert held * 960 // 961 <= 300 * 4 * 8 * 64, "one spare block besides"


def test_fp8_is_refused_where_it_cannot_be(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = OPTIONS.model_copy(update={"kv_precision": "fp8", "device": "cpu"})
    with pytest.raises(ResourceError, match="are a GPU's"):
        EngineCore(tiny_model, wanted)
    with pytest.raises(ResourceError, match="its own way"):
        EngineCore(tiny_model, wanted.model_copy(update={"backend": "transformers"}))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ResourceError, match=r"capability 8\.9"):
        build._check_gpu(wanted, torch.device("cuda"))


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
        ({"cache_bytes": 1000}, "blocks of 4 tokens"),
    ],
)
def test_what_a_gpu_cannot_do_is_refused(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], says: str
) -> None:
    monkeypatch.setattr(build, "gpu", lambda: torch.device("cpu"))
    with pytest.raises(ResourceError, match=says):
        EngineCore(tiny_model, OPTIONS.model_copy(update={"device": "cuda", **changes}))


@CPU
def test_a_process_uses_the_gpus_it_was_given() -> None:
    options = EngineOptions()
    assert (options.placed(0).device, options.placed(1).device) == ("cpu", "cuda")
    assert EngineOptions(device="cpu").placed(1).device == "cpu"
    with pytest.raises(RecipeError, match="cut over 4 GPUs, the replica has 2"):
        EngineOptions(tensor_parallel=4).placed(2)
