"""What Ray's own metrics are told."""

from __future__ import annotations

from typing import Any

import pytest

from cluster import ray_metrics
from cluster.ledger.snapshot import ModelRow, Snapshot
from cluster.metrics import Counts, Outcome
from cluster.prometheus import families

OUTCOME = Outcome("a", "chat", "alice", 1, 200, total_s=0.5)


class Gauge:
    """As Ray's, but it tells what it was told."""

    values: dict[tuple[str, frozenset[Any]], float]

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        assert description
        self.name, self.tag_keys = name, tag_keys

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert tuple(sorted(tags)) == self.tag_keys
        self.values[self.name, frozenset(tags.values())] = value


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, frozenset[Any]], float]:
    Gauge.values = {}
    monkeypatch.setattr(ray_metrics, "Gauge", Gauge)
    monkeypatch.setattr(ray_metrics.ray, "is_initialized", lambda: True)
    return Gauge.values


def test_ray_is_told_what_has_changed(told: dict[tuple[str, frozenset[Any]], float]):
    counts, adapter = Counts(lambda _: True), ray_metrics.RayMetrics()
    loaded = Snapshot("e", models={"a": ModelRow(leases=2), "b": ModelRow()})
    counts.ended(OUTCOME)
    first = adapter.tell(families(counts, loaded))
    assert first == len(told)
    assert told["slotpool_requests_total", frozenset(("a", "chat", "200", "high", "alice"))] == 1
    assert told["slotpool_leases", frozenset("a")] == 2
    assert told["slotpool_request_seconds_bucket", frozenset(("a", "0.5"))] == 1
    assert adapter.tell(families(counts, loaded)) == 0
    counts.ended(OUTCOME)
    adapter.tell(families(counts, Snapshot("e", models={"b": ModelRow()})))
    assert told["slotpool_requests_total", frozenset(("a", "chat", "200", "high", "alice"))] == 2
    assert told["slotpool_leases", frozenset("a")] == 0, "the model is gone"


def test_without_ray_nothing_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ray_metrics.ray, "is_initialized", lambda: False)
    assert ray_metrics.RayMetrics().tell(families(Counts(lambda _: True), Snapshot("e"))) == 0
