"""Layouts: what cannot be cut is refused with the nearest value that can; the search is fast and explains itself."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelyard.errors import RecipeError, ResourceError
from modelyard.planner import Layout
from modelyard.planner.architecture import parse
from modelyard.planner.layout import nearest_divisor, validate
from modelyard.planner.search import search
from modelyard.planner.time import bubble


@pytest.mark.parametrize(
    ("layout", "constraint", "nearest"),
    [
        (Layout(tensor=5), "attention heads", "4"),
        (Layout(pipeline=3), "layers", "2"),
        (Layout(data=3, shard=3), "batch", "63"),
        (Layout(context=3), "sequence length", "2"),
        (Layout(data=4, shard=3), "shard", "2"),
        (Layout(expert=2, data=2), "experts", "1"),
        (Layout(tensor=0), "tensor", "1"),
        (Layout(zero=7), "zero", "3"),
    ],
)
def test_impossible_layouts_name_the_nearest(
    layout: Layout, constraint: str, nearest: str, llama_8b: dict[str, Any]
) -> None:
    with pytest.raises(RecipeError) as error:
        validate(layout, parse(llama_8b), 2048, 64)
    assert constraint in error.value.what
    assert nearest in error.value.mend


def test_experts_must_divide(mixtral: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="experts") as error:
        validate(Layout(data=6, shard=6, expert=3), parse(mixtral), 2048, 60)
    assert "2" in error.value.mend


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_nearest_divisor_divides_and_none_is_nearer(value: int, wanted: int) -> None:
    found = nearest_divisor(value, wanted)
    assert value % found == 0
    assert all(abs(d - wanted) >= abs(found - wanted) for d in range(1, value + 1) if value % d == 0)


def test_512_gpus_in_two_seconds(llama_70b: dict[str, Any]) -> None:
    began = time.perf_counter()
    found = search(llama_70b, sequence_length=8192, global_batch=1024, devices=512, hardware="h100")
    assert time.perf_counter() - began < 2
    steps = [c.step.seconds for c in found.candidates]
    assert steps == sorted(steps)
    assert 0.3 < found.best.step.mfu < 0.65
    assert all(c.layout.devices == 512 and c.memory.peak < 80e9 for c in found.candidates)
    assert all(c.reason for c in found.candidates[1:])
    assert sum(found.rejected.values()) + len(found.candidates) <= found.tried


def test_bubble_by_schedule() -> None:
    one = Layout(pipeline=8)
    assert bubble(one, 32) == 7 / 32
    assert bubble(replace(one, schedule="interleaved", virtual=4), 32) == 7 / 128
    assert bubble(replace(one, schedule="zbv"), 32) < bubble(replace(one, schedule="zero-bubble"), 32) < 7 / 32


def test_a_mixture_is_searched_with_experts(mixtral: dict[str, Any]) -> None:
    found = search(mixtral, sequence_length=4096, global_batch=256, devices=32, hardware="h100", keep=200)
    assert any(c.layout.expert > 1 for c in found.candidates)


def test_slower_links_change_the_choice(llama_70b: dict[str, Any]) -> None:
    from modelyard.planner import find_hardware

    h100 = find_hardware("h100")
    slow = replace(h100, intra=h100.inter / 4, inter=h100.inter / 8)
    fast = search(llama_70b, sequence_length=4096, global_batch=512, devices=64, hardware=h100)
    poor = search(llama_70b, sequence_length=4096, global_batch=512, devices=64, hardware=slow)
    assert poor.best.step.communication_share > fast.best.step.communication_share


def test_what_cannot_fit(llama_70b: dict[str, Any]) -> None:
    with pytest.raises(ResourceError, match="closest"):
        search(llama_70b, sequence_length=8192, global_batch=8, devices=2, hardware="l4")
    with pytest.raises(RecipeError, match="spread"):
        search({**llama_70b, "num_hidden_layers": 79}, sequence_length=4096, global_batch=1, devices=97)
    with pytest.raises(RecipeError, match="devices"):
        search(llama_70b, sequence_length=8192, global_batch=8, devices=0)
