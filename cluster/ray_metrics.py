"""The pool's figures through Ray, so that Ray's dashboard and its Grafana have them as well.

An adapter and nothing more: it copies samples, as gauges, into `ray.util.metrics`, which prefixes their names with
`ray_`. Off where this process runs without Ray.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import ray
from prometheus_client.core import Metric
from ray.util.metrics import Gauge


class RayMetrics:
    """Remembers what Ray was told, and tells it what has changed since."""

    def __init__(self) -> None:
        self._gauges: dict[str, Any] = {}
        self._told: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}

    def tell(self, families: Iterable[Metric]) -> int:
        """Copy what has changed; how many samples that was. A series that is gone falls to 0."""
        if not ray.is_initialized():
            return 0
        now = {
            (sample.name, frozenset(sample.labels.items())): (float(sample.value), family.documentation)
            for family in families
            for sample in family.samples
        }
        changed = {key: value for key, (value, _) in now.items() if self._told.get(key) != value}
        changed |= {key: 0.0 for key, value in self._told.items() if key not in now and value}
        for key, value in changed.items():
            name, labels = key
            tags = dict(labels)
            gauge = self._gauges.get(name)
            if gauge is None:
                gauge = self._gauges[name] = Gauge(name, now[key][1], tag_keys=tuple(sorted(tags)))
            gauge.set(value, tags)
        self._told |= changed
        return len(changed)
