"""The scheduler's judgement, as functions of the books that change nothing: who is refused, what a swap costs, and
when a waiter's right to a place begins.

A *swap* takes a place from a resident model V for a waiting model W. Learned figures stand behind it, per model:
`load_s` (what its loads took), `service_s` and `drain_s` (what its leases last, on average and at most) and `gap_s`
(the time between its arrivals). An idle V is swapped out at once. A busy V is left to run dry by itself, since every
swap costs everybody two loads; it is drained before that only if

* somebody's *bound* comes near, or the deadline of his own (`bound_at`): a promise, whatever it costs;
* W's first waiter is of a *strictly higher class* than all that runs and waits on V; or
* it *pays* (`pays`): V will not pause soon (`busy_time`), and what W's users lose until then outweighs what V's users
  lose through a swap now rather than at the pause (`harm`), high, medium and low weighing 4 : 2 : 1.

Whatever it is, V has its *minimum turn* (`turn_end`): where everybody is overdue, shorter turns would only mean that
more of the time goes into swaps. Where nobody waits for V, a configured bound need not wait for the end of the turn.
When a bound comes near, V first serves those who waited for it by then (`gate`).

`tests/bench/bench_policy.py` shows what that is worth: without bounds the rule above is as good as "whoever is loaded
goes first", which nobody without foresight beats in mean wait as long as the resident models pause now and then, and
which starves all others when they do not.
"""

from __future__ import annotations

from enum import IntEnum
from math import expm1, log
from typing import TYPE_CHECKING, Any, NamedTuple

from cluster.ledger import transitions
from cluster.ledger.books.queue import INFINITY
from cluster.ledger.books.servers import is_remote
from cluster.ledger.states import ReplicaState

if TYPE_CHECKING:
    from cluster.ledger.books.pool import Pool
    from cluster.ledger.books.records import Model, Replica, Waiter
    from cluster.ledger.books.shapes import Place

READY, DRAINING = ReplicaState.READY, ReplicaState.DRAINING


class Refusal(NamedTuple):
    """Why a request is not accepted: a class of `cluster.errors`, a message for a person, and extras."""

    name: str
    message: str
    extras: dict[str, Any]


# --- admission --------------------------------------------------------------------------------------------------


def unavailable(pool: Pool, model: Model, now: float) -> Refusal | None:
    """Why a model can take no request at all, not even a waiting one; None if it can."""
    if model.removed and is_remote(model):
        names = sorted(name for name, each in pool.models.items() if not each.removed)
        return Refusal("ModelNotFound", f"the model {model.name!r} does not exist", {"available_models": names})
    if model.removed:
        return Refusal("ModelNotFound", f"the model {model.name!r} was removed", {})
    if model.unloading:
        return unloading(model)
    if pool.servers.known:
        if pool.servers.offers(model.name):
            return None
        if is_remote(model):
            return None if pool.servers.undecided else unreachable(pool, model)
    if model.spec.manual and not (model.placed or model.order or model.queue.count):
        return Refusal("ModelNotLoaded", f"the model {model.name!r} is loaded by an operator only", {})
    if model.refusing and now < model.backoff_until and not model.serving:
        return failure(model, now, "ModelUnavailable")
    return too_large(pool, model)


def is_unhealthy(pool: Pool, model: Model, now: float) -> bool:
    """A request would be refused, or would wait for a model that failed to load a moment ago."""
    return unavailable(pool, model, now) is not None or (now < model.backoff_until and not model.serving)


def unreachable(pool: Pool, model: Model) -> Refusal:
    """A model that only servers offer, and none of them can be reached."""
    message = f"no server that offers {model.name!r} can be reached: {pool.servers.error(model.name)}"
    return Refusal("BackendUnavailable", message, {"status": 502, "code": "upstream_connection_error"})


def unloading(model: Model) -> Refusal:
    extras = {"code": "model_unloading", "status": 409}
    return Refusal("ModelUnavailable", f"the model {model.name!r} is being unloaded", extras)


def too_large(pool: Pool, model: Model, replicas: int = 1) -> Refusal | None:
    """So many replicas of the model would not fit into the pool if it were empty. What serves does fit."""
    if replicas <= model.serving or pool.book.could_ever_fit(model.shape, replicas):
        return None
    if not pool.book.has_named_devices(model.shape):
        named = ", ".join(model.shape.only)
        message = f"the model {model.name!r} is bound to GPU {named}, which no machine of the pool has"
        return Refusal("MemoryBudgetExceeded", message, {})
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
    return "loading" if model.rising and not model.counts[READY] else "queued"


def split_wait(model: Model, waiter: Waiter, now: float) -> tuple[float, float]:
    """A waiter's time so far, as (in the queue, for loads of its model)."""
    waited = now - waiter.arrived
    if model.loaded_at <= waiter.arrived:
        return waited, 0.0
    loading = 0.0
    for start, end in model.last_load:
        loading += max(0.0, end - max(start, waiter.arrived))
    loading = min(loading, waited)
    return waited - loading, loading


def has_capacity(pool: Pool, model: Model) -> bool:
    """The number of resident models allows one more replica of this one."""
    if not pool.spec.capacity or model.placed:
        return True
    promised = sum(1 for each in pool.claims if not each.placed and each is not model)
    return len(pool.resident) + promised < pool.spec.capacity


# --- what is worth what -----------------------------------------------------------------------------------------


class Tier(IntEnum):
    """How much a victim hurts. A model's right to a place is the worst tier that it may take.

    LOWER is busy, with nothing but lower classes than the waiter's.
    """

    LEAVING = 0
    IDLE = 1
    SURPLUS = 2
    LOWER = 3
    BUSY = 4
    PROTECTED = 5


class Plan(NamedTuple):
    """A place, who must leave for it, and how much that hurts."""

    tier: Tier
    cost: float
    place: Place
    victims: list[Replica]


# A drain begins this many times its expected time, and the load's, before the bound: estimates are no promises. With
# 2.5 a bound that fits the hardware would be near from the start: in `skewed-93-7` everybody waits 20 % longer.
LEAD = 1.5

# Where no bound is configured, it is so many times the swap cost by class, but not below so many seconds: a second is
# long for a model that loads in a tenth of one, and half a minute is impossible for one that takes a minute.
BOUND_SWAPS = (3.0, 8.0, 20.0)
BOUND_FLOOR_S = (5.0, 15.0, 40.0)

# A swap that merely pays must promise this many times its cost. With 4, `bench_policy` has bursts (seeds 5 and 7) in
# which swaps that looked worth while cost everybody 13 to 16 % more than none; with 8 no seed of eight has.
MARGIN = 8.0

# How much a second of waiting weighs in a swap that must pay, by class. A bound, when reached, outweighs all.
CLASS_WEIGHT = {1: 4.0, 2: 2.0, 3: 1.0}


def load_time(pool: Pool, model: Model) -> float:
    """What it takes to load a model, or to wake it where an engine of it sleeps."""
    loads_s = pool.spec.load_prior_s if model.load_s is None else model.load_s
    return min(loads_s, model.wake_s) if model.sleeping and model.wake_s is not None else loads_s


def swap_cost(pool: Pool, model: Model) -> float:
    """What it takes to bring a model in: somebody's stop, and its load, in seconds as learned."""
    return pool.stop_s + load_time(pool, model)


def turn_s(pool: Pool, model: Model) -> float:
    """For how long after its load a replica keeps its place while others wait for it, too."""
    return pool.spec.turn_swaps * swap_cost(pool, model)


def turn_end(pool: Pool, replica: Replica) -> float:
    """Until when a replica keeps its place while others wait for it, too; while it has any work, but for a promise."""
    return replica.loaded_at + turn_s(pool, replica.model)


def residency_s(pool: Pool, model: Model) -> float:
    """For how long after its load a busy replica keeps its place against swaps that merely pay."""
    return max(pool.spec.min_residency_s, pool.spec.residency_loads * load_time(pool, model))


def residency_end(pool: Pool, replica: Replica) -> float:
    """Until when a busy replica keeps its place against swaps that merely pay."""
    return replica.loaded_at + residency_s(pool, replica.model)


def arrival_rate(model: Model, now: float) -> float:
    """Requests per second, fading when none come."""
    gap = max(model.gap_s, now - model.last_arrival)
    return 1.0 / gap if 0.0 < gap < INFINITY else 0.0


def busy_time(model: Model, now: float) -> float:
    """How long a model will go on being busy by itself, roughly: its line, and then until no lease overlaps the next.

    The second part is the busy period of a queue with as many servers as it likes, `(e^load - 1) / rate`: short for a
    model that pauses now and then, practically infinite under overlapping streams.
    """
    rate = arrival_rate(model, now)
    load = min(rate * model.service_s, 30.0)
    slots = model.spec.slots * max(1, model.counts[READY])
    line = model.queue.count * model.service_s / slots / max(0.05, 1.0 - load / slots)
    return line + (expm1(load) / rate if rate else model.service_s)


def drain_time(model: Model, leases: int) -> float:
    """How long so many leases will last: the longest of so many exponential times, but no longer than ever seen."""
    return min(model.drain_s, model.service_s * (log(leases) + 0.6) if leases else 0.0)


def harm(pool: Pool, victim: Replica, waiting: Model, now: float) -> float:
    """What the victim's users lose, in request-seconds, by a swap now rather than at its next idle moment."""
    model = victim.model
    shared = max(1, model.counts[READY])
    back = load_time(pool, waiting) + load_time(pool, model) + 2.0 * pool.stop_s
    back += waiting.service_s * (1.0 + waiting.queue.count / (waiting.spec.slots or 1))
    outage = drain_time(model, len(victim.leases)) + back
    rate = arrival_rate(model, now)
    return (model.queue.count * outage + rate * (outage * outage - back * back) / 2.0) / shared


def pays(pool: Pool, waiting: Model, plan: Plan, now: float) -> bool:
    """It is worth more to the waiting to get in now than to everybody else to go on until the victims pause.

    Two tests, both of which must hold: what the waiting will lose until that pause is several times the cost (an
    estimate, hence the margin), and they have already lost as much as the cost (a fact). The cost counts the victims'
    users and, for everybody else who waits in the pool, the time that one more swap there and back takes away.
    """
    until_idle = max((busy_time(victim.model, now) for victim in plan.victims), default=0.0)
    head = waiting.queue.head()
    rival = min((best_class(victim.model) for victim in plan.victims), default=3)
    weight = 1.0 if head is None else CLASS_WEIGHT[head.priority] / CLASS_WEIGHT[min(rival, 3)]
    others = len(pool.waiters) - waiting.queue.count
    cost = plan.cost + 2.0 * (load_time(pool, waiting) + pool.stop_s) * others
    expected = weight * waiting.queue.count * until_idle
    return expected >= MARGIN * cost and weight * waiting.queue.waited(now) >= cost


def gate(pool: Pool, waiting: Model) -> tuple[int, float] | None:
    """Whom the waiters of a model whose bound has come stand back for: (the lowest class, since when), None if nobody.

    Somebody waited for the resident model when it was loaded, or when the others became due: he is served first.
    That is gated service: who comes later waits for the next turn. It ends, whatever the flood, and where everybody is
    overdue a turn clears a whole line instead of a few batches. A deadline and a higher class than his go before, and a
    bound that was configured, unless his own is due as well (`victims.Verdict`).
    """
    head = waiting.queue.head()
    due = bound_at(pool, waiting)
    if head is None or due >= waiting.queue.first_deadline() - lead_s(pool, waiting):
        return None
    return head.priority, due


def is_held(pool: Pool, model: Model, now: float, bound: bool) -> bool:
    """No other model may have its place. A pin by a request gives way to a bound `max_keep_alive_s` after the last."""
    if not model.is_pinned:
        return False
    return model.spec.pinned or not bound or now < model.last_arrival + pool.spec.max_keep_alive_s


def best_class(model: Model) -> int:
    """The highest class among a model's leases and waiters; 4 if it has none."""
    for index in range(3):
        if model.by_priority[index] or model.queue.counts[index]:
            return index + 1
    return 4


def bound_s(pool: Pool, model: Model, priority: int) -> float:
    """The longest wait for a place that is strived for, in seconds: as configured, or to fit what a swap costs."""
    index = priority - 1
    configured = pool.spec.bound_s[index]
    return max(BOUND_FLOOR_S[index], BOUND_SWAPS[index] * swap_cost(pool, model)) if configured is None else configured


def is_promised(pool: Pool, model: Model) -> bool:
    """Somebody who waits for the model has a bound that was configured; one that fits a swap is no promise."""
    return any(pool.spec.bound_s[head.priority - 1] is not None for head in model.queue.heads())


def bound_at(pool: Pool, model: Model) -> float:
    """When a drain must begin so that nobody waits longer than his class's bound, or than he will wait at all."""
    heads = model.queue.heads()
    first = min((head.arrived + bound_s(pool, model, head.priority) for head in heads), default=INFINITY)
    return min(first, model.queue.first_deadline()) - lead_s(pool, model)


def lead_s(pool: Pool, model: Model) -> float:
    """So long before a bound a drain begins: what the drain, the stop and the load take, and some more."""
    return LEAD * (load_time(pool, model) + pool.stop_s + pool.drain_s)


def because(
    pool: Pool, model: Model, plans: list[Plan], rule: str, victims: tuple[str, ...], now: float
) -> transitions.Because:
    """Why these victims must go for a model, and why now; for those who watch."""
    cost_s = round(sum(plan.cost for plan in plans if plan.tier > Tier.SURPLUS), 3)
    head = model.queue.head()
    if head is None:
        return transitions.Because(rule, None, None, cost_s, victims)
    bound_in_s = round(head.arrived + bound_s(pool, model, head.priority) - now, 3)
    return transitions.Because(rule, head.request, bound_in_s, cost_s, victims)
