"""How many replicas a model should have: from its queue, its oldest wait and the use of its slots."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.ledger.books import stops
from cluster.ledger.books.queue import INFINITY
from cluster.ledger.books.records import Model, Replica
from cluster.ledger.rules import sleepers
from cluster.ledger.states import ReplicaState

if TYPE_CHECKING:
    from cluster.ledger.books.pool import Pool

READY, DRAINING, UNLOADING = ReplicaState.READY, ReplicaState.DRAINING, ReplicaState.UNLOADING

# A `keep_alive` of 0 ends idleness at once; the use of slots is still judged over some time.
SHORTEST_WINDOW_S = 1.0


def missing(pool: Pool, model: Model, now: float) -> int:
    """How many replicas demand asks for beyond those that serve or start; at once one, or an order's rest."""
    if model.removed or model.unloading or now < model.backoff_until:
        return 0
    serving = model.serving
    room = room_for_more(pool, model)
    if model.order is not None:
        return max(0, min(model.order.replicas - serving, room))
    if room <= 0 or not model.queue.count:
        return 0
    if not serving:
        return 1
    backlog = model.queue.count - model.rising * model.spec.slots
    if backlog <= 0:
        return 0
    return 1 if backlog >= model.spec.slots or now >= grows_at(pool, model) else 0


def room_for_more(pool: Pool, model: Model) -> int:
    """How many more replicas of a model may load now, if there is a place for them."""
    # Nothing is loaded beside one that makes room for another model, or it would take that room at once.
    if (model.counts[DRAINING] or model.counts[UNLOADING]) and _makes_room(pool, model):
        return 0
    room = model.spec.max_replicas - model.serving
    if pool.keeps_replicas:
        return min(room, sleepers.seats(pool, model))
    # Nothing is started beside one that stops: see rule 1 in `states.py`.
    return 0 if model.leaving else room


def _makes_room(pool: Pool, model: Model) -> bool:
    """A replica of the model drains, or its engine ends, for others, or has drained and cannot be stopped yet.

    One that only must not serve any longer keeps nobody waiting: its streams may last for hours.
    """
    for replica in model.replicas:
        if replica.is_placed and replica.state in (DRAINING, UNLOADING):
            if replica.claim is not None and replica.claim.model is not model:
                return True
            if not stops.is_outdated(pool.book, replica):
                return True
            # Serve would stop the new one first. So there is one such at most, however often a configuration changes.
            if not (pool.keeps_replicas or replica.leases):
                return True
    return False


def grows_at(pool: Pool, model: Model) -> float:
    """When the oldest waiter has waited long enough to ask for one more replica."""
    if not model.counts[READY] or model.rising:
        return INFINITY
    return min((head.since for head in model.queue.heads()), default=INFINITY) + pool.spec.upscale_wait_s


def floor_missing(pool: Pool, model: Model, now: float) -> int:
    """How many replicas are to be kept without demand and are not there."""
    if model.order is not None or now < model.backoff_until or model.held_down or model.removed or model.unloading:
        return 0
    floor = model.floor
    if model.spec.preload and not model.ever_loaded:
        floor = max(floor, 1)
    return max(0, min(floor - model.serving, room_for_more(pool, model)))


def idle_due(pool: Pool, model: Model) -> float:
    """When the longest idle replica will have been idle for the model's timeout; infinite if none may go.

    On nodes of which Serve may choose any, none goes before all may.
    """
    # Beside one that starts nothing is closed: Serve would stop the newer one, and that would look like a failed load.
    if not model.buckets[0] or model.queue.count or model.rising or model.counts[READY] <= model.floor:
        return INFINITY
    if model.counts[READY] > 1 and stops.first_of(pool.book, model, (READY,)) is None:
        if model.floor or model.leased:
            return INFINITY
        return max(each.idle_since for each in model.buckets[0]) + model.idle_timeout_s
    return next(iter(model.buckets[0])).idle_since + model.idle_timeout_s


def surplus_due(model: Model) -> float:
    """When the present window of slot use ends; only models with more than one replica have one."""
    if model.rising or model.counts[READY] <= max(1, model.floor):
        return INFINITY
    return model.peak_since + max(SHORTEST_WINDOW_S, model.idle_timeout_s)


def close_surplus(pool: Pool, model: Model, now: float) -> Replica | None:
    """One replica that was not needed at any time of the window that ends; starts the next window."""
    fewer = (model.counts[READY] - 1) * model.spec.slots
    enough = model.peak <= fewer and not model.queue.count
    model.peak = model.leased
    model.peak_since = now
    return stops.first_of(pool.book, model, (READY,)) if enough else None
