"""Metric names, dashboards and alert rules. Imports nothing but errors and prometheus_client.

`metrics` holds every Prometheus metric of the platform; `dashboards` and `rules` generate the files
under `dashboards/` from those names (`python -m modelyard.monitor.dashboards --write dashboards/`).
"""

from modelyard.monitor.metrics import ALL, CURATION, SERVING, TRAINING, Metric

__all__ = ["ALL", "CURATION", "SERVING", "TRAINING", "Metric"]
