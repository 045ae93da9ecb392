from __future__ import annotations

import re

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from modelyard.monitor import ALL, CURATION, SERVING, TRAINING, Metric


def test_names_follow_the_conventions_of_prometheus() -> None:
    names = [metric.name for metric in ALL]
    assert len(set(names)) == len(names)
    for metric in ALL:
        assert re.fullmatch(r"modelyard_[a-z0-9_]+", metric.name)
        assert metric.name.endswith("_total") == (metric.kind == "counter"), metric.name
        assert metric.help.endswith("."), metric.name
        assert (metric.kind == "histogram") == bool(metric.buckets), metric.name
        assert list(metric.buckets) == sorted(set(metric.buckets)), metric.name


def test_every_metric_appears_under_its_name() -> None:
    registry = CollectorRegistry()
    for metric in ALL:
        made = getattr(metric, metric.kind)(registry)
        if metric.labels:
            made.labels(*["x"] * len(metric.labels))
    text = generate_latest(registry).decode()
    for metric in ALL:
        for series in metric.series:
            assert re.search(rf"^{series}[{{ ]", text, re.MULTILINE), series


def test_a_metric_is_not_made_as_another_kind() -> None:
    with pytest.raises(TypeError, match="is a gauge"):
        Metric("modelyard_x", "gauge", "X.").counter(CollectorRegistry())


def test_each_metric_belongs_to_one_group() -> None:
    assert len(ALL) == len(SERVING) + len(TRAINING) + len(CURATION) == len(set(ALL))
