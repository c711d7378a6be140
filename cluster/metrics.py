"""What the pool counts. An ingress says how each request ended, in the message that gives its lease back.

The ledger's actor does the counting, so that the figures are the whole pool's and outlive an ingress.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from cluster import errors
from cluster.ledger.events import Reject
from cluster.ledger.states import ReplicaState
from cluster.ledger.transitions import SwapBegun, Transition
from cluster.request import Request

#: The classes of requests, by their priority.
CLASSES = {1: "high", 2: "medium", 3: "low"}
#: What nginx made the custom: the client has left before there was an answer.
CLIENT_LEFT = 499
#: Names of keys beyond so many are counted together, as "other".
MAX_PRINCIPALS = 1000
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
#: The histograms, in the order of `ModelFigures.add`, and where their buckets end.
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
    that broke later than its head. `ttft_s` and `total_s` count from the request's arrival at the ingress. `trace` is
    the client's own `X-Request-Id`. `restored_tokens` is None where no saved conversation was looked for.
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
    trace: str = ""
    restored_tokens: int | None = None

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


def refused(request: Request, reject: Reject | None) -> Outcome:
    """The outcome of a request that was never granted; None stands for a client that left."""
    status = CLIENT_LEFT
    if reject is not None:
        kind: type[errors.PoolError] = getattr(errors, reject.error, errors.PoolError)
        status = int(reject.extras.get("status", kind.status))
    asked = request.model, family(request.path), request.principal, request.priority
    return Outcome(*asked, status, trace=request.trace)


class Histogram:
    """How many values fell into each bucket, and their sum."""

    __slots__ = ("buckets", "counts", "total")

    def __init__(self, buckets: tuple[float, ...]) -> None:
        self.buckets = buckets
        self.counts = [0] * (len(buckets) + 1)
        self.total = 0.0


class ModelFigures:
    """What is counted of one model's requests."""

    __slots__ = (
        "_histograms",
        "histograms",
        "kv_hits",
        "kv_misses",
        "kv_restored_tokens",
        "tokens_cached",
        "tokens_in",
        "tokens_out",
    )

    def __init__(self) -> None:
        self.tokens_in = self.tokens_out = self.tokens_cached = 0
        self.kv_hits = self.kv_misses = self.kv_restored_tokens = 0
        self.histograms = {name: Histogram(buckets) for name, buckets in HISTOGRAMS.items()}
        self._histograms = tuple(self.histograms.values())

    def add(self, outcome: Outcome) -> None:
        """Count one request. All of them pass here, so it is written to be quick."""
        _, _, _, _, _, queue_s, load_s, ttft_s, total_s, tokens_in, tokens_cached, tokens_out, _, restored = outcome
        self.tokens_in += tokens_in or 0
        self.tokens_out += tokens_out or 0
        self.tokens_cached += tokens_cached or 0
        if restored is not None:
            self.kv_restored_tokens += restored
            self.kv_hits += restored > 0
            self.kv_misses += restored == 0
        tpot_s = outcome.tpot_s if tokens_out else None
        for histogram, value in zip(self._histograms, (queue_s, load_s, ttft_s, tpot_s, total_s), strict=True):
            if value is not None:
                histogram.counts[bisect_left(histogram.buckets, value)] += 1
                histogram.total += value


class _Series:
    """Requests that have all labels in common."""

    __slots__ = ("count", "labels", "model")

    def __init__(self, labels: tuple[str, ...], model: ModelFigures) -> None:
        self.labels = labels
        self.model = model
        self.count = 0


class Counts:
    """All that is counted in one life of the ledger, by label values. Plain numbers; nothing here blocks.

    Every label is bounded: models are those that `knows` knows, principals the names of configured keys.
    """

    def __init__(self, knows: Callable[[str], bool]) -> None:
        self.models: dict[str, ModelFigures] = {}
        self.swaps: Counter[tuple[str, str]] = Counter()
        self.drains: Counter[tuple[str, str]] = Counter()
        self.evictions: Counter[str] = Counter()
        self.load_failures: Counter[str] = Counter()
        self.engine_deaths: Counter[str] = Counter()
        self.kv_saved_bytes: Counter[str] = Counter()
        self._knows = knows
        self._series: dict[tuple[str, ...], _Series] = {}
        # the same by what outcomes say of themselves, so that most of them need one look; bounded like the labels
        self._short_cuts: dict[tuple[object, ...], _Series] = {}
        self._principals: set[str] = set()

    @property
    def requests(self) -> dict[tuple[str, ...], int]:
        """Requests by model, family, status, class and principal."""
        return {series.labels: series.count for series in self._series.values()}

    def totals(self) -> dict[str, int]:
        """Requests that ended, and their tokens, over all models."""
        return {
            "requests": sum(series.count for series in self._series.values()),
            "prompt_tokens": sum(model.tokens_in for model in self.models.values()),
            "output_tokens": sum(model.tokens_out for model in self.models.values()),
        }

    def ended(self, outcome: Outcome) -> None:
        """A request ended."""
        series = self._short_cuts.get(outcome[:5])
        if series is None:
            series = self._find(outcome)
        series.count += 1
        series.model.add(outcome)

    def _find(self, outcome: Outcome) -> _Series:
        is_known = self._knows(outcome.model)
        has_room = outcome.principal in self._principals or len(self._principals) < MAX_PRINCIPALS
        if has_room:
            self._principals.add(outcome.principal)
        labels = (
            outcome.model if is_known else "unknown",
            outcome.family,
            str(outcome.status) if 100 <= outcome.status <= 599 else "other",
            CLASSES.get(outcome.priority, "other"),
            outcome.principal if has_room else "other",
        )
        series = self._series.get(labels)
        if series is None:
            model = self.models.setdefault(labels[0], ModelFigures())
            series = self._series[labels] = _Series(labels, model)
        if is_known and has_room and labels[2] != "other" and labels[3] != "other":
            self._short_cuts[outcome[:5]] = series
        return series

    def moved(self, transition: Transition) -> None:
        """A replica changed its state, or a swap began."""
        model = transition.model
        if isinstance(transition, SwapBegun):
            self.swaps[model, transition.reason] += 1
            return
        cause, before = transition.cause, transition.before
        if cause == "quiesced":
            self.drains[model, transition.reason] += 1
        elif cause == "emptied" or (cause == "dismissed" and before is ReplicaState.DRAINING):
            self.evictions[model] += 1
        elif before in (ReplicaState.STARTING, ReplicaState.LOADING):
            # What was taken back says why, and did not fail.
            was_taken_back = cause in ("withdrawn", "dismissed") or transition.reason != ""
            if transition.reason == "load_timeout" or not (was_taken_back or cause in ("announced", "loaded")):
                self.load_failures[model] += 1
        elif before in (ReplicaState.READY, ReplicaState.DRAINING) and cause != "reopened":
            # Neither drained nor reopened: the engine is gone without being asked to.
            self.engine_deaths[model] += 1
