"""What the pool counts. An ingress says how each request ended, in the message that gives its lease back.

The ledger's actor does the counting, so that the figures are the whole pool's and outlive an ingress.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from typing import NamedTuple

from cluster.ledger.states import ReplicaState
from cluster.ledger.transitions import SwapBegun, Transition

#: The classes of requests, by their priority.
CLASSES = {1: "high", 2: "medium", 3: "low"}
#: Names of keys beyond so many are counted together, as "other".
MAX_PRINCIPALS = 1000
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
#: The histograms, and where their buckets end.
HISTOGRAMS = {
    "queue_wait_seconds": _SECONDS,
    "load_wait_seconds": _SECONDS,
    "ttft_seconds": _SECONDS,
    "tpot_seconds": _TOKEN_SECONDS,
    "request_seconds": _SECONDS,
}
#: The last part of a route, by which a request's family is called in the figures.
_FAMILIES = {
    "chat/completions": "chat",
    "completions": "completions",
    "embeddings": "embeddings",
    "rerank": "rerank",
    "responses": "responses",
    "messages": "messages",
}


class Outcome(NamedTuple):
    """How one request ended, as its ingress saw it. Times are in seconds; None is what nobody knows.

    `model` is the one that answered, or the one that was asked for if none did; `status` is HTTP's, also for a stream
    that broke later than its head. `ttft_s` and `total_s` count from the request's arrival at the ingress.
    """

    model: str
    family: str
    principal: str
    priority: int
    status: int
    queue_wait_s: float | None = None
    load_wait_s: float | None = None
    ttft_s: float | None = None
    total_s: float | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None

    @property
    def tpot_s(self) -> float | None:
        """Seconds per output token after the first; None where there is no second one."""
        if self.ttft_s is None or self.total_s is None or self.output_tokens is None or self.output_tokens < 2:
            return None
        return max(0.0, self.total_s - self.ttft_s) / (self.output_tokens - 1)


def family(path: str) -> str:
    """The family of a route: `chat` for `/v1/chat/completions`; `other` for what has no name of its own."""
    route = path.strip("/").removeprefix("llm-pool/").removeprefix("v1/")
    return _FAMILIES.get(route, "other")


class Histogram:
    """How many values fell into each bucket, and their sum. Adding costs half a microsecond."""

    __slots__ = ("buckets", "counts", "total")

    def __init__(self, buckets: tuple[float, ...]) -> None:
        self.buckets = buckets
        self.counts = [0] * (len(buckets) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.buckets, value)] += 1
        self.total += value


class Counts:
    """All that is counted in one life of the ledger, by label values. Plain numbers; nothing here blocks.

    Every label is bounded: models are those of the configuration, principals the names of its keys.
    """

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, str, str, str, str]] = Counter()
        self.tokens_in: Counter[str] = Counter()
        self.tokens_out: Counter[str] = Counter()
        self.tokens_cached: Counter[str] = Counter()
        self.swaps: Counter[tuple[str, str]] = Counter()
        self.drains: Counter[tuple[str, str]] = Counter()
        self.evictions: Counter[str] = Counter()
        self.load_failures: Counter[str] = Counter()
        self.engine_deaths: Counter[str] = Counter()
        self.histograms: dict[str, dict[str, Histogram]] = {name: {} for name in HISTOGRAMS}
        self._principals: set[str] = set()

    def ended(self, outcome: Outcome, is_known: bool) -> None:
        """A request ended. `is_known`: its model exists; any other name is a client's own word."""
        model = outcome.model if is_known else "unknown"
        principal = outcome.principal
        if principal not in self._principals:
            if len(self._principals) >= MAX_PRINCIPALS:
                principal = "other"
            else:
                self._principals.add(principal)
        status = str(outcome.status) if 100 <= outcome.status <= 599 else "other"
        self.requests[model, outcome.family, status, CLASSES.get(outcome.priority, "other"), principal] += 1
        self.tokens_in[model] += outcome.prompt_tokens or 0
        self.tokens_out[model] += outcome.output_tokens or 0
        self.tokens_cached[model] += outcome.cached_tokens or 0
        self._add("queue_wait_seconds", model, outcome.queue_wait_s)
        self._add("load_wait_seconds", model, outcome.load_wait_s)
        self._add("ttft_seconds", model, outcome.ttft_s)
        self._add("tpot_seconds", model, outcome.tpot_s)
        self._add("request_seconds", model, outcome.total_s)

    def _add(self, name: str, model: str, value: float | None) -> None:
        if value is None:
            return
        by_model = self.histograms[name]
        histogram = by_model.get(model)
        if histogram is None:
            histogram = by_model[model] = Histogram(HISTOGRAMS[name])
        histogram.add(value)

    def moved(self, transition: Transition) -> None:
        """A replica changed its state, or a swap began."""
        model = transition.model
        if isinstance(transition, SwapBegun):
            self.swaps[model, transition.reason] += 1
            return
        cause, before = transition.cause, transition.before
        if cause == "quiesced":
            self.drains[model, transition.reason] += 1
        elif cause == "emptied":
            self.evictions[model] += 1
        elif before is ReplicaState.STARTING:
            # What was taken back says why, and did not fail.
            if transition.reason == "" and cause not in ("loaded", "announced", "withdrawn"):
                self.load_failures[model] += 1
        elif before in (ReplicaState.READY, ReplicaState.DRAINING) and cause != "reopened":
            # Neither drained nor reopened: the engine is gone without being asked to.
            self.engine_deaths[model] += 1
