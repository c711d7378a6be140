"""The pool's figures through Ray, so that Ray's dashboard and its Grafana have them as well.

An adapter and nothing more: it copies samples, as gauges, into `ray.util.metrics`, which prefixes their names with
`ray_`. Off where this process runs without Ray.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import Any

import ray
from prometheus_client.core import Metric
from ray.util.metrics import Gauge

logger = logging.getLogger("slotpool.ledger")

#: How often, in seconds. A copy of a thousand changed samples takes some milliseconds.
PERIOD_S = 10.0


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


async def keep_telling(families: Callable[[], Iterable[Metric]]) -> None:
    """Copy the figures into Ray's own now and then. Runs until cancelled."""
    metrics = RayMetrics()
    while True:
        await asyncio.sleep(PERIOD_S)
        try:
            metrics.tell(families())
        except Exception:
            logger.exception("could not tell Ray the metrics")
