"""The pool's figures in Prometheus' words: what was counted (`metrics.Counts`), and what a snapshot shows.

`docs/metrics.md` names them all. Made on demand, in the ledger's actor, from plain numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from cluster.ledger.snapshot import Snapshot
from cluster.ledger.states import ReplicaState
from cluster.metrics import CLASSES, Counts, Histogram

PREFIX = "slotpool_"

#: Label values with their figure, None where nobody knows it.
Samples = Iterable[tuple[tuple[str, ...], float | None]]
_HISTOGRAM_HELP = {
    "queue_wait_seconds": "Time that a request waited for a slot, without the wait for a load",
    "load_wait_seconds": "Time that a request waited for its model to be loaded",
    "ttft_seconds": "Time from a request's arrival to its first token, waits included",
    "tpot_seconds": "Time per output token after the first",
    "request_seconds": "Time from a request's arrival to its end",
}


def render(counts: Counts, snapshot: Snapshot) -> bytes:
    """The text that Prometheus scrapes."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Families(families(counts, snapshot)))
    return generate_latest(registry)


class _Families(Collector):
    """Families that are there already, as a registry wants them."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Iterable[Metric]:
        return self._families

    def describe(self) -> Iterable[Metric]:
        return ()


def families(counts: Counts, snapshot: Snapshot) -> Iterator[Metric]:
    """Every family with its samples."""
    labels = ("model", "family", "status", "class", "principal")
    yield _counter("requests", "Requests that ended", labels, counts.requests.items())
    by_model = ("model",)
    figures = counts.models.items()
    tokens_in = (((name,), each.tokens_in) for name, each in figures)
    yield _counter("tokens_in", "Prompt tokens", by_model, tokens_in)
    tokens_out = (((name,), each.tokens_out) for name, each in figures)
    yield _counter("tokens_out", "Output tokens", by_model, tokens_out)
    tokens_cached = (((name,), each.tokens_cached) for name, each in figures)
    yield _counter("tokens_cached", "Prompt tokens that needed no evaluation", by_model, tokens_cached)
    restored = (((name,), each.kv_restored_tokens) for name, each in figures)
    yield _counter("kv_restored_tokens", "Prompt tokens that an earlier engine had saved", by_model, restored)
    hits = (((name,), each.kv_hits) for name, each in figures)
    yield _counter("kv_store_hits", "Requests that went on with a saved conversation", by_model, hits)
    misses = (((name,), each.kv_misses) for name, each in figures)
    yield _counter("kv_store_misses", "Requests whose prompt was sought and not saved", by_model, misses)
    saved = "Bytes of conversations that engines saved at their end"
    yield _counter("kv_saved_bytes", saved, by_model, _by_one(counts.kv_saved_bytes))
    swap_help = "Times that room was promised to a waiting model, by why others had to go"
    yield _counter("swaps", swap_help, ("model", "reason"), counts.swaps.items())
    yield _counter("drains", "Replicas that were drained, by why", ("model", "reason"), counts.drains.items())
    yield _counter("evictions", "Replicas that were drained and stopped", by_model, _by_one(counts.evictions))
    yield _counter("load_failures", "Loads that failed", by_model, _by_one(counts.load_failures))
    deaths = "Engines that died after their load"
    yield _counter("engine_deaths", deaths, by_model, _by_one(counts.engine_deaths))
    for name, text in _HISTOGRAM_HELP.items():
        yield _histogram(name, text, {model: each.histograms[name] for model, each in figures})
    yield from _gauges(snapshot)


def _gauges(snapshot: Snapshot) -> Iterator[Metric]:
    models, by_model = snapshot.models, ("model",)
    yield _gauge("leases", "Requests that run now", by_model, (((name,), row.leases) for name, row in models.items()))
    queued = (
        ((name, CLASSES[index + 1]), count)
        for name, row in models.items()
        for index, count in enumerate(row.queued_by_class)
    )
    yield _gauge("queued", "Requests that wait now", ("model", "class"), queued)
    slots: Counter[tuple[str, ...]] = Counter({(name,): 0 for name in models})
    states = [state.name for state in ReplicaState if state is not ReplicaState.COLD]
    replicas: Counter[tuple[str, ...]] = Counter({(name, state.lower()): 0 for name in models for state in states})
    for replica in snapshot.replicas:
        slots[replica.model,] += replica.slots if replica.state == "READY" else 0
        replicas[replica.model, replica.state.lower()] += 1
    yield _gauge("slots", "Slots of the replicas that serve", by_model, slots.items())
    yield _gauge("replicas", "Replicas by their state", ("model", "state"), replicas.items())
    estimated = (((name,), row.memory_estimated_mib) for name, row in models.items())
    yield _gauge("memory_estimated_mib", "Memory that a replica is expected to take", by_model, estimated)
    measured = (((name,), row.memory_mib) for name, row in models.items())
    yield _gauge("memory_measured_mib", "Memory that a replica was measured to take", by_model, measured)
    load = (((name,), row.load_s) for name, row in models.items())
    yield _gauge("load_seconds", "What a load takes, as learned", by_model, load)
    stalled = "1 while requests wait and nothing moves any more"
    yield _gauge("stalled", stalled, (), [((), float(snapshot.stalled is not None))])


def _by_one(counter: Counter[str]) -> Samples:
    return (((key,), value) for key, value in counter.items())


def _counter(name: str, text: str, labels: tuple[str, ...], values: Samples) -> Metric:
    family = CounterMetricFamily(PREFIX + name, text, labels=labels)
    for key, value in values:
        family.add_metric(key, value or 0)
    return family


def _gauge(name: str, text: str, labels: tuple[str, ...], values: Samples) -> Metric:
    family = GaugeMetricFamily(PREFIX + name, text, labels=labels)
    for key, value in values:
        if value is not None:
            family.add_metric(key, value)
    return family


def _histogram(name: str, text: str, values: dict[str, Histogram]) -> Metric:
    family = HistogramMetricFamily(PREFIX + name, text, labels=("model",))
    for model, histogram in values.items():
        buckets, below = [], 0
        for end, count in zip((*histogram.buckets, float("inf")), histogram.counts, strict=True):
            below += count
            buckets.append(("+Inf" if end == float("inf") else repr(end), float(below)))
        family.add_metric((model,), buckets, histogram.total)
    return family
