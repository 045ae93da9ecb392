"""From two looks at a server's `/metrics` to what happened between them: rates, quantiles, replicas, by version."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from modelyard.monitor import metrics as m

ALL = ""
"""The version under which all versions together are found."""


@dataclass(frozen=True)
class Look:
    """One look: sums of counters and of histogram buckets, gauges; each for every version and for all together."""

    values: Mapping[tuple[str, str], float]
    """(series, version) -> value."""
    buckets: Mapping[tuple[str, str], Mapping[float, float]] = field(default_factory=dict)
    """(histogram, version) -> upper bound -> count of what lies at or below it."""

    @property
    def versions(self) -> tuple[str, ...]:
        """Versions that have a series, sorted."""
        return tuple(sorted({version for _, version in self.values if version != ALL}))


def read(text: str) -> Look:
    """A look at the text of `/metrics`."""
    from prometheus_client.parser import text_string_to_metric_families

    values: dict[tuple[str, str], float] = defaultdict(float)
    buckets: dict[tuple[str, str], dict[float, float]] = defaultdict(lambda: defaultdict(float))
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if not sample.labels.get("endpoint", "/v1/").startswith("/v1/"):
                continue  # health checks and looks like this one are no traffic
            failed = sample.name == m.REQUESTS.name and sample.labels.get("code", "").startswith("5")
            names = [sample.name, *(["failed"] if failed else []), *_part(sample.name, sample.labels)]
            for version in {ALL, sample.labels.get("version", ALL)}:
                if sample.name.endswith("_bucket"):
                    bound = float(sample.labels["le"])
                    buckets[sample.name.removesuffix("_bucket"), version][bound] += sample.value
                else:
                    for name in names:
                        values[name, version] += sample.value
    return Look(dict(values), {key: dict(found) for key, found in buckets.items()})


def _part(name: str, labels: Mapping[str, str]) -> list[str]:
    return ["generated"] if name == m.TOKENS.name and labels.get("direction") == "completion" else []


def between(before: Look, after: Look, seconds: float) -> dict[str, float]:
    """What to log of the time between two looks; each version's figures under `version_<v>/`.

    Rates are a second, times in seconds. A quantile is left out when nothing was measured.
    """
    found = _of(ALL, before, after, seconds)
    for version in after.versions:
        found |= {f"version_{version}/{k}": v for k, v in _of(version, before, after, seconds).items()}
    return found


def _of(version: str, before: Look, after: Look, seconds: float) -> dict[str, float]:
    def rate(name: str) -> float:
        key = name, version
        return max(0.0, after.values.get(key, 0.0) - before.values.get(key, 0.0)) / seconds

    found = {
        "replicas": after.values.get((m.REPLICAS.name, version), 0.0),
        "requests_per_second": rate(m.REQUESTS.name),
        "failed_per_second": rate("failed"),
        "tokens_per_second": rate("generated"),
    }
    for name, metric in (("first_token", m.TIME_TO_FIRST_TOKEN), ("answer", m.REQUEST_SECONDS)):
        now, then = after.buckets.get((metric.name, version), {}), before.buckets.get((metric.name, version), {})
        gained = sorted((bound, count - then.get(bound, 0.0)) for bound, count in now.items())
        for share in (0.5, 0.99):
            value = quantile(gained, share)
            if not math.isnan(value):
                found[f"{name}_p{share * 100:.0f}"] = value
    return found


def quantile(buckets: Sequence[tuple[float, float]], share: float) -> float:
    """A quantile of cumulative buckets, interpolated within its bucket; nan of none.

    In the last, open bucket it is that bucket's lower bound, as in Prometheus.
    """
    if not buckets or buckets[-1][1] <= 0:
        return math.nan
    rank, low, below = share * buckets[-1][1], 0.0, 0.0
    for bound, count in buckets:
        if count >= rank and count > below:
            return low if math.isinf(bound) else low + (bound - low) * (rank - below) / (count - below)
        low, below = bound, count
    return low
