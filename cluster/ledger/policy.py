"""The scheduler's judgement, as functions of the books that change nothing: who is refused, what a swap costs, and
when a waiter's right to a place begins.

A *swap* takes a place from a resident model V for a waiting model W. Three learned figures stand behind it, each per
model: `load_s` (what its loads took), `drain_s` (about the longest that its leases last) and `gap_s` (the time between
its arrivals). While W gets in and V gets back, `outage = drain V + load W + serve W + load V` passes, and V's users
wait instead: those who queue for V wait `outage` each, those who come meanwhile half of it on average. W's users pay
for not swapping with every second that they wait. As in the ski-rental problem the swap is made when W's side has
paid as much as the swap will cost V's side: never much worse than the best that anybody could do who knew the future.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, Any, NamedTuple

from cluster.ledger.queue import INFINITY, Waiter
from cluster.ledger.states import ReplicaState

if TYPE_CHECKING:
    from cluster.ledger.pool import Pool
    from cluster.ledger.records import Model, Replica

READY, STARTING, DRAINING = ReplicaState.READY, ReplicaState.STARTING, ReplicaState.DRAINING


class Refusal(NamedTuple):
    """Why a request is not accepted: a class of `cluster.errors`, a message for a person, and extras."""

    name: str
    message: str
    extras: dict[str, Any]


# --- admission --------------------------------------------------------------------------------------------------


def unavailable(pool: Pool, model: Model, now: float) -> Refusal | None:
    """Why a model can take no request at all, not even a waiting one; None if it can."""
    if model.removed:
        return Refusal("ModelNotFound", f"the model {model.name!r} was removed", {})
    if model.unloading:
        return unloading(model)
    if model.spec.manual and not (model.replicas or model.order or model.queue.count):
        return Refusal("ModelNotLoaded", f"the model {model.name!r} is loaded by an operator only", {})
    if model.refusing and now < model.backoff_until and not model.serving:
        return failure(model, now, "ModelUnavailable")
    return too_large(pool, model)


def unloading(model: Model) -> Refusal:
    extras = {"code": "model_unloading", "status": 409}
    return Refusal("ModelUnavailable", f"the model {model.name!r} is being unloaded", extras)


def too_large(pool: Pool, model: Model, replicas: int = 1) -> Refusal | None:
    """So many replicas of the model would not fit into the pool if it were empty."""
    if pool.book.could_ever_fit(model.shape, replicas):
        return None
    what = f"the model {model.name!r} is" if replicas == 1 else f"{replicas} replicas of {model.name!r} are"
    return Refusal("MemoryBudgetExceeded", f"{what} larger than the pool", {})


def failure(model: Model, now: float, error: str) -> Refusal:
    """The model failed to load."""
    extras: dict[str, Any] = {"retry_after": max(1.0, model.backoff_until - now)}
    if error == "BackendTimeout":
        extras["phase"] = "loading"
    return Refusal(error, f"the model {model.name!r} failed to load: {model.last_error}", extras)


def phase(model: Model) -> str:
    """What a waiter of the model waits for."""
    return "loading" if model.counts[STARTING] and not model.counts[READY] else "queued"


def retry_after(model: Model) -> float:
    """When it may be worth while to come again: about when half of the line will be gone."""
    slots = max(1, model.counts[READY]) * model.spec.slots
    return min(60.0, max(1.0, 0.5 * model.queue.count * model.service_s / slots))


def split_wait(model: Model, waiter: Waiter, now: float) -> tuple[float, float]:
    """A waiter's time so far, as (in the queue, for loads of its model)."""
    loading = 0.0
    for start, end in model.last_load:
        loading += max(0.0, min(end, now) - max(start, waiter.arrived))
    waited = now - waiter.arrived
    loading = min(loading, waited)
    return waited - loading, loading


def has_capacity(pool: Pool, model: Model) -> bool:
    """The number of resident models allows one more replica of this one."""
    if not pool.spec.capacity or model.replicas:
        return True
    promised = sum(1 for each in pool.claims if not each.replicas and each is not model)
    return len(pool.resident) + promised < pool.spec.capacity


# --- what is worth what -----------------------------------------------------------------------------------------


class Tier(IntEnum):
    """How much a victim hurts. A model's right to a place is the worst tier that it may take."""

    LEAVING = 0
    IDLE = 1
    SURPLUS = 2
    OUTRANKED = 3
    BUSY = 4
    PROTECTED = 5


def load_time(pool: Pool, model: Model) -> float:
    return pool.spec.load_prior_s if model.load_s is None else model.load_s


def residency_end(pool: Pool, replica: Replica) -> float:
    """Until when a busy replica keeps its place against swaps that merely pay."""
    spec = pool.spec
    stay = max(spec.min_residency_s, spec.residency_loads * load_time(pool, replica.model))
    return replica.since + stay


def arrival_rate(model: Model, now: float) -> float:
    """Requests per second, fading when none come."""
    gap = max(model.gap_s, now - model.last_arrival)
    return 1.0 / gap if 0.0 < gap < INFINITY else 0.0


def swap_cost(pool: Pool, victim: Replica, waiting: Model, now: float) -> float:
    """What the victim's users will lose, in request-seconds, if its door closes now."""
    model = victim.model
    outage = model.drain_s + load_time(pool, waiting) + waiting.service_s + load_time(pool, model)
    harm = model.queue.count * outage + arrival_rate(model, now) * outage * outage / 2.0
    return harm / max(1, model.counts[READY])


def standing(pool: Pool, replica: Replica, waiting: Model, now: float, bound: bool) -> tuple[Tier, float] | None:
    """A replica as a victim for `waiting`: its tier and its cost in there, or None if it may not be one."""
    model = replica.model
    if replica.claim is None and (replica.state.is_leaving or replica.state is DRAINING):
        return Tier.LEAVING, 0.0
    if replica.state is not READY or model is waiting or model.is_pinned:
        return None
    spare = model.counts[READY] > model.floor
    if not replica.leases and not model.queue.count and spare:
        return Tier.IDLE, 1.0 / (1.0 + now - replica.idle_since)
    ready = model.counts[READY]
    if spare and ready > 1 and model.leased + model.queue.count <= (ready - 1) * model.spec.slots:
        return Tier.SURPLUS, 1.0 + len(replica.leases)
    if bound:
        return (Tier.BUSY if spare else Tier.PROTECTED), swap_cost(pool, replica, waiting, now)
    if not spare or now < residency_end(pool, replica):
        return None
    head = waiting.queue.head()
    if head is not None and head.priority < best_class(model):
        return Tier.OUTRANKED, swap_cost(pool, replica, waiting, now)
    return Tier.BUSY, swap_cost(pool, replica, waiting, now)


def best_class(model: Model) -> int:
    """The highest class among a model's leases and waiters; 4 if it has none."""
    for index in range(3):
        if model.by_priority[index] or model.queue.classes[index]:
            return index + 1
    return 4


def bound_at(pool: Pool, model: Model) -> float:
    """When the longest waiting of a class has waited so long that a door must close for it to keep its bound."""
    lead = load_time(pool, model) + model.boost
    return min(
        (head.arrived + pool.spec.bound_s[head.priority - 1] - lead for head in model.queue.heads()), default=INFINITY
    )
