"""Hardware, money, energy, inference and serving modes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from modelyard.errors import RecipeError, ResourceError
from modelyard.planner import Estimate, Layout, estimate_training, find_hardware
from modelyard.planner.cost import carbon_intensity, cost, price, spot_overhead
from modelyard.planner.energy import EnergyMeter, rapl_joules, read_rapl
from modelyard.planner.hardware import find_gpu, load_table, names
from modelyard.planner.inference import deploy, largest_batch, rates
from modelyard.planner.measured import compare
from modelyard.planner.modes import compare_modes


@pytest.mark.parametrize("name", ["a100", "h100", "h200", "b200", "l4", "l40s", "mi300x", "tpu-v5e", "epyc-9654"])
def test_the_table_knows(name: str) -> None:
    hw = find_hardware(name)
    assert hw.memory > 1e9 and hw.bandwidth > 1e9 and hw.watts > 0 and hw.source
    assert price(hw) is not None


def test_tables_are_dated_and_sourced() -> None:
    for table in ("hardware", "prices", "regions", "megatron_weak_scaling"):
        found = load_table(table)
        assert found["date"] and found["source"]
    assert all(row["source"] for row in load_table("hardware")["devices"].values())


def test_unknown_hardware_suggests_the_nearest() -> None:
    with pytest.raises(RecipeError) as error:
        find_hardware("H10")
    assert "h100" in error.value.mend
    with pytest.raises(RecipeError, match="fp8"):
        find_hardware("a100").flops("fp8")


def test_this_machine_is_a_core() -> None:
    hw = find_hardware(None)
    assert hw.kind == "cpu" and hw.flops("fp32") > 1e9
    assert "this-machine" in names()


def test_own_rows_override(tmp_path: Path) -> None:
    path = tmp_path / "prices.yaml"
    path.write_text("devices: {h100: {on_demand: 2.0, spot: 1.0}}\n")
    assert price(find_hardware("h100"), path=str(path)) == 2.0
    assert price(find_hardware("h200"), path=str(path)) == price(find_hardware("h200"))


def test_cost_of_device_hours() -> None:
    hw = find_hardware("h100")
    found = cost(10, 16, hw, region="france", pue=1.1, utilisation=1.0)
    assert found.device_hours == 160
    assert found.on_demand_usd == pytest.approx(160 * 6.88)
    assert found.kwh == pytest.approx(160 * 0.7 * 1.1)
    assert found.co2e_kg == pytest.approx(found.kwh * 0.056)
    assert found.spot_hours and found.spot_hours > 10
    assert found.spot_usd and found.on_demand_usd and found.spot_usd < found.on_demand_usd
    assert cost(10, 8192, hw).spot_usd is None


def test_spot_overhead_grows_with_nodes_until_nothing_is_left() -> None:
    assert 1 < spot_overhead(8, 8) < spot_overhead(64, 8)
    with pytest.raises(RecipeError, match="never end"):
        spot_overhead(4096, 8)


def test_regions() -> None:
    assert carbon_intensity("Sweden") < carbon_intensity("world")
    with pytest.raises(RecipeError) as error:
        carbon_intensity("frence")
    assert "france" in error.value.mend


@pytest.mark.parametrize("options", [{"tokens": 0}, {"tokens": -1}, {"workers": 0}, {"sequence_length": 0}])
def test_budgets_must_be_positive(tiny: dict[str, Any], options: dict[str, float]) -> None:
    settings = {"tokens": 1e6, "sequence_length": 256, "global_batch": 32, "workers": 2} | options
    with pytest.raises(RecipeError, match=next(iter(options))):
        estimate_training(tiny, **settings)  # type: ignore[arg-type]


def test_estimate_of_a_published_run(llama_70b: dict[str, Any]) -> None:
    """Llama 2 70B: 2 T tokens took 1,720,320 A100 hours (arXiv 2307.09288)."""
    layout = Layout(data=128, shard=128, zero=1, tensor=8, recompute="selective")
    found = estimate_training(llama_70b, 2e12, 4096, 1024, 128, "a100", precision_name="master", layout=layout)
    assert found.seconds is not None
    assert found.seconds / 3600 * 1024 == pytest.approx(1_720_320, rel=0.35)


def test_rates_are_bound_by_memory_then_by_arithmetic(llama_8b: dict[str, Any]) -> None:
    h100 = find_hardware("h100")
    one, many = (rates(llama_8b, h100, batch=b, prompt=512, answer=256) for b in (1, 128))
    # One request cannot go faster than reading the weights once a token.
    assert one.time_per_token > 2 * 7.5e9 / h100.bandwidth
    assert many.decode_tokens_per_second > 30 * one.decode_tokens_per_second
    assert many.prefill_tokens_per_second == one.prefill_tokens_per_second


def test_deployment_meets_load_and_latency(llama_8b: dict[str, Any]) -> None:
    found = deploy(llama_8b, hardware="h100", requests_per_second=100, prompt=512, answer=256, time_per_token=0.02)
    assert found.rates.time_per_token <= 0.02
    assert found.replicas * found.rates.requests_per_second * 0.7 >= 100
    assert found.usd_per_million_tokens is not None and 0 < found.usd_per_million_tokens < 10


def test_unreachable_targets(llama_70b: dict[str, Any], llama_8b: dict[str, Any]) -> None:
    with pytest.raises(ResourceError, match="one request needs"):
        largest_batch(llama_70b, find_hardware("l4"), prompt=512, answer=256)
    with pytest.raises(ResourceError, match="a token takes"):
        largest_batch(llama_8b, find_hardware("l4"), prompt=512, answer=256, time_per_token=0.001)


def test_serving_modes_and_break_even(llama_8b: dict[str, Any]) -> None:
    def compare_at(requests: float) -> Any:
        return compare_modes(llama_8b, hardware="h100", hourly_requests=[requests] * 24, prompt=512, answer=256)

    def usd(found: Any, name: str) -> float:
        return next(mode.usd_per_day for mode in found.modes if mode.name == name)

    idle, busy = compare_at(10), compare_at(60_000)
    assert usd(idle, "serverless") < usd(idle, "real-time")
    assert usd(busy, "real-time") < usd(busy, "serverless")
    assert busy.cheapest.name == "batch"
    point = busy.break_even["serverless / real-time"]
    assert point is not None and 240 < point < 24 * 60_000
    at = compare_at(point / 24)
    assert usd(at, "serverless") == pytest.approx(usd(at, "real-time"), rel=0.35)


@pytest.mark.parametrize("profile", [[1.0] * 23, [0.0] * 24, [-1.0] * 24])
def test_bad_profiles(llama_8b: dict[str, Any], profile: list[float]) -> None:
    with pytest.raises(RecipeError, match="traffic profile"):
        compare_modes(llama_8b, hardware="h100", hourly_requests=profile, prompt=10, answer=10)


def test_energy_is_estimated_and_says_so(tmp_path: Path) -> None:
    with EnergyMeter(find_hardware(None), devices=2, powercap=tmp_path) as meter:
        sum(range(1000))
    assert meter.result.source == "tdp x 0.90"
    assert meter.result.kwh == pytest.approx(8 * 2 * 0.9 * meter.result.seconds / 3.6e6)


def test_energy_from_counters_that_wrap(tmp_path: Path) -> None:
    package = tmp_path / "intel-rapl:0"
    package.mkdir()
    (package / "max_energy_range_uj").write_text("1000000")
    (package / "energy_uj").write_text("900000")
    before = read_rapl(tmp_path)
    (package / "energy_uj").write_text("100000")
    assert rapl_joules(before, read_rapl(tmp_path)) == pytest.approx(0.2)
    with EnergyMeter(find_hardware(None), powercap=tmp_path) as meter:
        pass
    assert meter.result.source.startswith("rapl")


def test_predicted_against_measured() -> None:
    rows = compare(Estimate(tokens=1000, seconds=10, memory_bytes=100), seconds=8, tokens_per_second=125)
    assert [row.name for row in rows] == ["wall time", "tokens a second"]
    assert rows[0].error == pytest.approx(0.25)
    assert rows[0].row() == ("wall time", "10 s", "8 s", "+25%")


def test_energy_counts_the_share_and_the_measured_utilisation(tmp_path: Path) -> None:
    with EnergyMeter(find_hardware(None), devices=1, utilisation=None, powercap=tmp_path) as meter:
        end = time.process_time() + 0.05
        while time.process_time() < end:
            pass
    source, value = meter.result.source.split(" x ")
    assert source == "tdp" and 0 < float(value) <= 1
    package = tmp_path / "intel-rapl:0"
    package.mkdir()
    (package / "max_energy_range_uj").write_text("10000000")
    (package / "energy_uj").write_text("0")
    with EnergyMeter(find_hardware(None), share=0.5, powercap=tmp_path) as half:
        (package / "energy_uj").write_text("3600000")
    assert half.result.kwh == pytest.approx(0.5e-6)
    with EnergyMeter(find_hardware(None), here=False, powercap=tmp_path) as away:
        pass
    assert away.result.source.startswith("tdp")


@pytest.mark.parametrize(
    ("reported", "name"),
    [("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA A100-SXM4-40GB", "a100-40gb"), ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
     ("NVIDIA L40S", "l40s"), ("Tesla K80", None)],
)  # fmt: skip
def test_a_gpu_is_found_by_its_drivers_name(reported: str, name: str | None) -> None:
    found = find_gpu(reported)
    assert (found.name if found else None) == name
