"""The text that Prometheus scrapes, read back by its own client's parser."""

from __future__ import annotations

from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.ledger.events import EngineDied, LeaseReleased, ReplicaFailed, ReplicaReady, ReplicaStarted, RequestArrived
from cluster.ledger.ledger import Ledger
from cluster.ledger.specs import ModelSpec, NodeSpec, PoolSpec
from cluster.metrics import MAX_PRINCIPALS, Counts, Outcome
from cluster.prometheus import render

SPEC = PoolSpec(
    models={name: ModelSpec(name, slots=3, num_gpus=1.0, memory_mib=64) for name in "ab"},
    nodes={"n": NodeSpec("n", gpus=1)},
)
OUTCOME = Outcome("a", "chat", "alice", 1, 200, 0.02, 0.0, 0.5, 2.5, 10, 4, 5)


def read(counts: Counts, ledger: Ledger) -> dict[tuple[str, Any], float]:
    """Every sample by its name and labels."""
    text = render(counts, ledger.snapshot()).decode()
    return {
        (sample.name.removeprefix("slotpool_"), frozenset(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def key(name: str, *labels: str) -> tuple[str, frozenset[str]]:
    return name, frozenset(labels)


@pytest.fixture
def ledger() -> Ledger:
    return Ledger(SPEC, epoch="e", now=0.0)


def tell(ledger: Ledger, counts: Counts, *events: Any) -> None:
    for event in events:
        ledger.decide(event, 1.0)
        for each in ledger.transitions:
            counts.moved(each)


def test_requests_tokens_and_times(ledger: Ledger):
    counts = Counts(ledger.knows)
    counts.ended(OUTCOME)
    counts.ended(OUTCOME)
    counts.ended(OUTCOME._replace(status=504, ttft_s=None, total_s=None, output_tokens=None))
    found = read(counts, ledger)
    assert found[key("requests_total", "a", "chat", "200", "high", "alice")] == 2
    assert found[key("requests_total", "a", "chat", "504", "high", "alice")] == 1
    assert (found[key("tokens_in_total", "a")], found[key("tokens_out_total", "a")]) == (30, 10)
    assert found[key("tokens_cached_total", "a")] == 12
    assert (found[key("ttft_seconds_count", "a")], found[key("ttft_seconds_sum", "a")]) == (2, 1.0)
    assert found[key("ttft_seconds_bucket", "a", "0.25")] == 0
    assert found[key("ttft_seconds_bucket", "a", "0.5")] == found[key("ttft_seconds_bucket", "a", "+Inf")] == 2
    assert found[key("tpot_seconds_sum", "a")] == 1.0


def test_saved_conversations(ledger: Ledger):
    counts = Counts(ledger.knows)
    for restored in (None, 0, 700, 800):
        counts.ended(OUTCOME._replace(restored_tokens=restored))
    counts.kv_saved_bytes["b"] += 1000
    found = read(counts, ledger)
    assert (found[key("kv_store_hits_total", "a")], found[key("kv_store_misses_total", "a")]) == (2, 1)
    assert found[key("kv_restored_tokens_total", "a")] == 1500
    assert found[key("kv_saved_bytes_total", "b")] == 1000


def test_the_values_of_labels_are_bounded(ledger: Ledger):
    counts = Counts(ledger.knows)
    counts.ended(OUTCOME._replace(model="whatever a client says", status=12345))
    for index in range(MAX_PRINCIPALS + 10):
        counts.ended(OUTCOME._replace(principal=f"key-{index}"))
    counts.ended(OUTCOME._replace(model="another", status=12345))
    found = read(counts, ledger)
    assert found[key("requests_total", "unknown", "chat", "other", "high", "alice")] == 2
    assert found[key("requests_total", "a", "chat", "200", "high", "other")] == 11
    assert len(counts.requests) == MAX_PRINCIPALS + 1


def test_what_happens_to_replicas(ledger: Ledger):
    counts = Counts(ledger.knows)
    arrival = RequestArrived("r", "h", "a", 2, 9e9)
    tell(ledger, counts, arrival, ReplicaStarted("a", "u", "n"), ReplicaReady("u", 90))
    found = read(counts, ledger)
    assert (found[key("leases", "a")], found[key("slots", "a")]) == (1, 3)
    assert (found[key("replicas", "a", "ready")], found[key("replicas", "b", "ready")]) == (1, 0)
    assert (found[key("memory_measured_mib", "a")], found[key("memory_estimated_mib", "a")]) == (90, 64)
    assert key("memory_measured_mib", "b") not in found
    tell(ledger, counts, LeaseReleased("r", 1), RequestArrived("s", "h", "b", 1, 9e9))
    found = read(counts, ledger)
    assert found[key("queued", "b", "high")] == 1
    assert found[key("swaps_total", "b", "idle")] == found[key("drains_total", "a", "idle")] == 1
    assert found[key("evictions_total", "a")] == 1
    assert (key("load_failures_total", "a") in found, key("engine_deaths_total", "a") in found) == (False, False)


def test_failures_and_deaths_are_told_apart(ledger: Ledger):
    counts = Counts(ledger.knows)
    tell(ledger, counts, RequestArrived("r", "h", "a", 2, 9e9), ReplicaStarted("a", "u", "n"), ReplicaReady("u"))
    tell(ledger, counts, EngineDied("u", "signal 9"))
    found = read(counts, ledger)
    assert found[key("engine_deaths_total", "a")] == 1
    assert key("load_failures_total", "a") not in found
    ledger = Ledger(SPEC, epoch="e", now=0.0)
    tell(ledger, counts, RequestArrived("r", "h", "b", 2, 9e9), ReplicaStarted("b", "v", "n"), ReplicaFailed("v", "no"))
    assert read(counts, ledger)[key("load_failures_total", "b")] == 1
