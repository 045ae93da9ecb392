"""From two looks at `/metrics` to rates and quantiles by version."""

from __future__ import annotations

import math

import pytest

from modelyard.engine.request import EngineStats, StepOutput
from modelyard.serving.metrics import Exposition, Metrics
from modelyard.stages.series import between, quantile, read


def test_rates_and_quantiles_of_each_version_and_of_all() -> None:
    page, versions = Exposition(), {"1": Metrics(), "2": Metrics()}
    for version, metrics in versions.items():
        page.add(version, metrics.registry)
    before = read(page.render().decode())
    for version, count in (("1", 30), ("2", 10)):
        metrics = versions[version]
        metrics.observe([EngineStats(*range(13))] * int(version))
        for i in range(count):
            watch = metrics.watch(5)
            watch.saw(StepOutput((1, 2)))
            watch.saw(StepOutput((3,)))
            metrics.requests.labels("/v1/completions", "503" if i == 0 else "200").inc()
            metrics.requests.labels("/metrics", "200").inc(100)
            metrics.seconds.labels("/v1/completions").observe(0.2 if version == "1" else 20.0)
            metrics.seconds.labels("/healthz").observe(1000.0)
    found = between(before, read(page.render().decode()), 10.0)
    assert (found["requests_per_second"], found["tokens_per_second"], found["failed_per_second"]) == (4.0, 12.0, 0.2)
    assert (found["version_1/requests_per_second"], found["version_2/requests_per_second"]) == (3.0, 1.0)
    assert (found["replicas"], found["version_1/replicas"], found["version_2/replicas"]) == (3.0, 1.0, 2.0)
    assert 0.1 < found["answer_p50"] <= 0.25
    assert 10 < found["answer_p99"] <= 30
    assert found["version_1/answer_p99"] <= 0.25
    nothing = between(read(page.render().decode()), read(page.render().decode()), 10.0)
    assert nothing["requests_per_second"] == 0
    assert "answer_p50" not in nothing


def test_quantiles_of_buckets_are_interpolated() -> None:
    buckets = [(1.0, 0.0), (2.0, 50.0), (4.0, 100.0), (math.inf, 110.0)]
    assert quantile(buckets, 0.25) == pytest.approx(1.55)
    assert quantile(buckets, 0.5) == pytest.approx(2.2)
    assert quantile(buckets, 0.99) == 4.0
    assert math.isnan(quantile([], 0.5)) and math.isnan(quantile([(1.0, 0.0), (math.inf, 0.0)], 0.5))
