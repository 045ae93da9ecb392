"""Scaling laws: published forms, fits that find the coefficients data was made with, advice and choices."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from modelyard.errors import DataError, RecipeError
from modelyard.planner import Layout, count, find_hardware, step_time
from modelyard.planner.calibrate import Measurement, calibrate, predicted
from modelyard.planner.choose import choose, llama_shape
from modelyard.planner.fitting import advise, fit
from modelyard.planner.html import (
    cost_section,
    estimate_section,
    layouts_section,
    memory_section,
    page,
    parameters_section,
    returns_section,
)
from modelyard.planner.options import options
from modelyard.planner.scaling import Chinchilla, Kaplan, Run, envelope, isoflop, more_tokens, returns
from modelyard.planner.search import search

LAW = Chinchilla()


def runs(noise: float = 0.0) -> list[Run]:
    generator = np.random.default_rng(0)
    return [
        Run(n, d, LAW.loss(n, d) * math.exp(generator.normal(0, noise) if noise else 0.0))
        for n in np.geomspace(4e7, 1.6e10, 9)
        for d in np.geomspace(1e9, 4e11, 6)
    ]


def test_fit_finds_the_published_coefficients() -> None:
    found = fit(runs(), bootstrap=5)
    assert pytest.approx(1.69, rel=1e-3) == found.law.E
    assert pytest.approx(406.4, rel=1e-2) == found.law.A
    assert pytest.approx(410.7, rel=1e-2) == found.law.B
    assert found.law.alpha == pytest.approx(0.34, rel=1e-3)
    assert found.law.beta == pytest.approx(0.28, rel=1e-3)


def test_intervals_hold_the_truth_under_noise() -> None:
    found = fit(runs(noise=0.003), bootstrap=20)
    middle, low, high = found.predict(7e10, 1.4e12, level=0.95)
    assert low <= middle <= high
    assert middle == pytest.approx(LAW.loss(7e10, 1.4e12), rel=0.02)
    for name, value, least, most in found.rows(level=0.99):
        assert least <= value * 1.02 and most >= value * 0.98, name


def test_noise_is_not_taken_for_a_law() -> None:
    # A toy ladder as measured: unbounded, alpha came out at -0.07 and the optimum as a complex number.
    ladder = [(50_928, 49_152, 5.2575), (50_928, 102_400, 5.0931), (92_480, 94_208, 5.1434), (92_480, 184_320, 4.9873),
              (203_232, 204_800, 4.9892), (203_232, 405_504, 4.6502)]  # fmt: skip
    found = fit([Run(*run) for run in ladder], bootstrap=0)
    assert found.law.alpha >= 0
    assert found.unseen == ("parameters",)
    assert fit(runs(), bootstrap=0).unseen == ()


def test_three_approaches_agree() -> None:
    a, b = LAW.exponents
    assert (a, b) == pytest.approx((0.45, 0.55), abs=0.005)
    budgets = np.geomspace(6e18, 3e21, 5)
    profile = [
        Run(n, c / 6 / n, LAW.loss(n, c / 6 / n)) for c in budgets for n in LAW.optimal(c)[0] * np.geomspace(0.3, 3, 7)
    ]
    assert isoflop(profile) == pytest.approx((a, b), abs=0.01)
    curves = [
        (float(n), [(float(d), LAW.loss(n, d)) for d in np.geomspace(1e8, 5e11, 40)])
        for n in np.geomspace(7e7, 1.6e10, 24)
    ]
    assert envelope(curves) == pytest.approx((a, b), abs=0.02)


@pytest.mark.parametrize("law", [Chinchilla(), Kaplan()])
def test_optimal_uses_the_budget_and_is_a_minimum(law: Chinchilla | Kaplan) -> None:
    n, d = law.optimal(1e21)
    assert 6 * n * d == pytest.approx(1e21)
    assert all(law.loss(n, d) <= law.loss(n * f, d / f) + 1e-12 for f in (0.5, 0.9, 1.1, 2.0))


def test_returns_diminish() -> None:
    gains = [p.next_doubling for p in returns(LAW, [1e18, 1e20, 1e22, 1e24])]
    assert gains == sorted(gains, reverse=True) and gains[-1] > 0
    assert more_tokens(LAW, 1e9, 1e10) > more_tokens(LAW, 1e9, 1e11) > 0


def test_advice_says_what_the_next_doubling_buys() -> None:
    early = [(d, LAW.loss(1e9, d)) for d in np.geomspace(1e8, 1e10, 30)]
    advice = advise(early)
    assert not advice.stop
    assert advice.loss - advice.doubled == pytest.approx(more_tokens(LAW, 1e9, 1e10), rel=0.05)
    late = advise([(d, 2.0 + 5 / d) for d in np.geomspace(1e3, 1e6, 30)])
    assert late.stop and "next doubling buys" in late.text
    rising = advise([(float(i), abs(i - 10) / 10 + 2) for i in range(1, 20)])
    assert rising.stop and "risen" in rising.text


@pytest.mark.parametrize(
    "bad",
    [runs()[:5], [Run(1e9, d, 2.0) for d in np.geomspace(1e9, 1e10, 8)], [*runs(), Run(1e9, 1e9, -1.0)]],
)
def test_bad_runs(bad: list[Run]) -> None:
    with pytest.raises(DataError):
        fit(bad)


def test_bad_curves() -> None:
    with pytest.raises(DataError, match="points"):
        advise([(1, 2.0)])
    with pytest.raises(DataError, match="rise"):
        advise([(5 - i, 2.0) for i in range(5)])
    with pytest.raises(DataError):
        isoflop(runs()[:3])
    with pytest.raises(DataError):
        envelope([])


def test_calibration_finds_the_machine(tiny: dict[str, Any]) -> None:
    from dataclasses import replace

    truth = replace(find_hardware(None), efficiency=0.42, bandwidth=7e9)
    measured = []
    for batch, length in ((4, 256), (8, 256), (1, 1024), (2, 64)):
        layout = Layout(micro_batch=batch)
        seconds = step_time(tiny, sequence_length=length, global_batch=batch, hardware=truth, layout=layout).seconds
        measured.append(Measurement(tiny, length, batch, seconds, layout))
    found = calibrate(measured, find_hardware(None))
    assert found.efficiency == pytest.approx(0.42, rel=0.01)
    assert found.max_error < 0.01
    one = calibrate(measured[:1], find_hardware(None))
    assert predicted(measured[0], one.hardware) == pytest.approx(measured[0].seconds, rel=0.01)
    with pytest.raises(DataError):
        calibrate([], find_hardware(None))


@pytest.mark.parametrize("size", [8e6, 1.25e8, 1e9, 7e9, 7e10])
def test_shapes_are_near_the_size_asked(size: float) -> None:
    shape = llama_shape(size, 32_000)
    assert count(shape).total == pytest.approx(size, rel=0.12)
    assert shape["num_attention_heads"] % shape["num_key_value_heads"] == 0


def test_a_budget_is_used_up() -> None:
    found = choose(budget_usd=500, hardware="h100", devices=8)
    assert found.usd == pytest.approx(500, rel=0.01)
    n, d = LAW.optimal(6 * found.parameters * found.tokens)
    assert found.parameters == pytest.approx(n, rel=0.2) and found.tokens == pytest.approx(d, rel=0.25)
    longer = choose(hours=2 * found.hours, hardware="h100", devices=8)
    assert longer.loss < found.loss and longer.parameters > found.parameters
    limited = choose(budget_usd=500, hardware="h100", devices=8, tokens_available=1e9)
    assert limited.tokens == 4e9 and "data-limited" in limited.note


def test_a_fixed_model_gets_tokens(llama_8b: dict[str, Any]) -> None:
    found = choose(hours=24, hardware="h200", devices=8, config=llama_8b)
    assert found.config == llama_8b and not found.optimal and found.tokens > 1e9


@pytest.mark.parametrize(
    ("budget", "message"),
    [({}, "no budget"), ({"hours": 0}, "hours"), ({"budget_usd": -5}, "budget_usd"), ({"hours": 1e-7}, "at least")],
)
def test_bad_budgets(budget: dict[str, float], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        choose(hardware="h100", devices=8, **budget)
    assert message in str(error.value)


def test_options_leave_out_what_does_not_fit(llama_70b: dict[str, Any]) -> None:
    offers = options(llama_70b, 1e12, 4096, hardware=("l4", "h200"), devices=(1, 64))
    assert [(o.hardware, o.devices) for o in offers] == [("h200", 64)]


def test_page_is_self_contained(llama_70b: dict[str, Any]) -> None:
    found = search(llama_70b, sequence_length=4096, global_batch=512, devices=64)
    choice = choose(budget_usd=500, hardware="h100", devices=8)
    offers = options(choice.config, choice.tokens, 2048, hardware=("h100", "l4"), devices=(8, 64))
    assert [o.hours for o in offers] == sorted(o.hours for o in offers)
    html = page("plan <1>", [
        estimate_section("base", choice.estimate), parameters_section(llama_70b),
        memory_section(found.best.memory.rows(), 80e9), layouts_section(found), cost_section(offers),
        returns_section(flops=choice.estimate.flops),
    ])  # fmt: skip
    assert html.count("<svg") == 4 and "plan &lt;1&gt;" in html
    assert "http" not in html and "<script" not in html and "nan" not in html
