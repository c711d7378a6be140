"""What requests do: arrive, leave, and give their leases back.

The two hot paths, an arrival that finds a free slot and a release, touch a handful of dictionaries and never reach
the decision tree.
"""

from __future__ import annotations

import logging

from cluster.ledger.books.pool import Pool
from cluster.ledger.books.queue import INFINITY
from cluster.ledger.books.records import Model, Replica, Waiter
from cluster.ledger.events import LeaseReleased, RequestArrived, RequestCancelled
from cluster.ledger.handlers import server_slots
from cluster.ledger.rules import deadlines, estimate, policy
from cluster.ledger.states import ReplicaState

log = logging.getLogger(__name__)

# Nobody is told to stay away for longer, however long the line is: clients take it literally.
MAX_RETRY_AFTER_S = 20.0

# How many requests are refused at once because their time is up.
MAX_EXPIRED = 500

READY, DRAINING = ReplicaState.READY, ReplicaState.DRAINING


def request_arrived(pool: Pool, event: RequestArrived, now: float) -> None:
    request, holder, name, _, deadline, _, slots, _, _ = event
    lease = pool.leases.get(request)
    if lease is not None:
        pool.announce(lease)
        return
    if request in pool.waiters:
        return
    pool.submitted += 1
    model = pool.models.get(name)
    if model is None:
        model = _variant(pool, name, now)
    # One guard for all that is out of the ordinary keeps the ordinary arrival short.
    if model is None or deadline <= now or request in pool.cancelled or holder in pool.dead_holders:
        model = _turn_away(pool, event, model, now)
        if model is None:
            return
    if now > model.last_arrival > -INFINITY:
        gap = now - model.last_arrival
        model.gap_s = gap if model.gap_s == INFINITY else model.gap_s + 0.2 * (gap - model.gap_s)
    model.last_arrival = now
    if (
        model.free
        and not model.queue.count
        and not pool.is_recovering
        and (replica := model.least_used() if slots == 1 else model.with_room(slots)) is not None
    ):
        _lease_now(pool, replica, event, now)
        return
    _admit(pool, model, event, now)


def _lease_now(pool: Pool, replica: Replica, event: RequestArrived, now: float) -> None:
    model = replica.model
    if model.keep_alive_s != event.keep_alive_s:
        model.keep_alive_s = event.keep_alive_s
        pool.touched[model] = None
    slots = event.slots if event.slots == 1 else min(event.slots, replica.slots)
    lease = pool.lease(event.request, event.holder, replica, event.priority, now, slots=slots)
    pool.announce(lease)


def _variant(pool: Pool, name: str, now: float) -> Model | None:
    """The next of a public name's variants: smooth weighted turns, so that 3:1 comes as a, a, b, a.

    Who cannot answer now has no turn, as long as another can.
    """
    variants = [
        (pool.models[model], weight) for model, weight in pool.spec.variants.get(name, ()) if model in pool.models
    ]
    if not variants:
        return None
    variants = [each for each in variants if not policy.is_unhealthy(pool, each[0], now)] or variants
    turns = pool.turns.setdefault(name, {})
    for model, weight in variants:
        turns[model.name] = turns.get(model.name, 0.0) + weight
    best = max(variants, key=lambda each: turns[each[0].name])[0]
    turns[best.name] -= sum(weight for _, weight in variants)
    return best


def _fallbacks(pool: Pool, name: str, model: Model) -> tuple[str, ...]:
    """Where a request for `name` may go if its model cannot answer: to the other variants first."""
    if name in pool.models:
        return model.spec.fallbacks
    others = sorted(pool.spec.variants.get(name, ()), key=lambda each: -each[1])
    return tuple(dict.fromkeys([each for each, _ in others if each != model.name] + list(model.spec.fallbacks)))


def _turn_away(pool: Pool, event: RequestArrived, model: Model | None, now: float) -> Model | None:
    """Refuse what can never be served, whatever the pool's state; the model if it can be, after all."""
    pool.cancelled.fade(now)
    pool.dead_holders.fade(now)
    model = model or server_slots.expected(pool, event.model, now)
    if event.request in pool.cancelled or event.holder in pool.dead_holders:
        # Nobody waits for it: its cancellation, or its holder's death, was faster than the arrival itself.
        pool.reject(event.request, event.holder, "BackendUnavailable", "the request was cancelled before it arrived")
    elif model is None:
        names = sorted({name for name, each in pool.models.items() if not each.removed} | set(pool.spec.variants))
        pool.reject(
            event.request,
            event.holder,
            "ModelNotFound",
            f"the model {event.model!r} does not exist",
            available_models=names,
        )
    elif event.deadline <= now:
        _time_out(pool, event.request, event.holder, model)
    else:
        return model
    return None


def _time_out(pool: Pool, request: str, holder: str, model: Model) -> None:
    phase = policy.phase(model)
    message = f"the deadline passed while the request was {phase}"
    pool.reject(request, holder, "BackendTimeout", message, phase=phase)


def expire_waiters(pool: Pool, now: float) -> None:
    """Reject those whose deadline has come: all of them, or if they are very many, the next ones at the next event."""
    for _ in range(MAX_EXPIRED):
        deadline, model = pool.next_deadline()
        waiter = None if model is None or deadline > now else model.queue.soonest()
        if waiter is None:
            break
        pool.dequeue(waiter)
        pool.touched[waiter.model] = None
        _time_out(pool, waiter.request, waiter.holder, waiter.model)


def _admit(pool: Pool, model: Model, event: RequestArrived, now: float) -> None:
    """Let a request wait, send it to another model, or refuse it."""
    waiter = Waiter(
        event.request, event.holder, model, event.priority, event.deadline, event.keep_alive_s, now, event.slots
    )
    # In the recovery window all wait, also beside free slots: a line says nothing then.
    threshold = 0 if pool.is_recovering else pool.spec.offload_queue_threshold
    if threshold and model.spec.num_gpus and model.queue.count >= threshold:
        other = pool.models.get(model.spec.cpu_offload_model or "")
        if other is not None:
            waiter.model = model = other
        elif not event.is_patient:
            _queue_full(pool, waiter, model, now)
            return
    waiter.fallbacks = _fallbacks(pool, event.model, model)
    if not pool.is_recovering:
        while (error := policy.unavailable(pool, model, now) or _too_late(pool, waiter, now)) is not None:
            other = next_fallback(pool, waiter)
            if other is None:
                pool.reject(waiter.request, waiter.holder, error.name, error.message, **error.extras)
                return
            waiter.model = model = other
        if not model.queue.count and (replica := model.with_room(event.slots)) is not None:
            _lease_now(pool, replica, event, now)
            return
    full = len(pool.waiters) >= pool.spec.queue_max_size
    limit = None if pool.is_recovering else model.spec.max_queued
    if not event.is_patient and (full or (limit is not None and model.queue.count >= limit)):
        if not server_slots.squeeze_in(pool, waiter, now):
            _queue_full(pool, waiter, model, now)
        return
    pool.enqueue(waiter, now)
    # One of a higher class goes before a wide one that waits before free slots.
    leads = model.free and model.queue.head() is waiter
    if leads or model.draining or model.pending_rank is not None or model.serving < model.spec.max_replicas:
        pool.touched[model] = None


def _too_late(pool: Pool, waiter: Waiter, now: float) -> policy.Refusal | None:
    """Why a request cannot be served before its deadline; None if it can, for all that is certain."""
    if waiter.deadline > deadlines.ready_after(pool, waiter.model):
        return None
    wait_s = estimate.wait_s(pool, waiter.model, waiter.priority, now)
    extras = {"retry_after": min(MAX_RETRY_AFTER_S, max(1.0, wait_s)), "expected_wait_s": round(wait_s, 1)}
    name = waiter.model.name
    return policy.Refusal("QueueFull", f"the model {name!r} is being loaded, which takes longer than you wait", extras)


def turn_away_late(pool: Pool, model: Model, now: float) -> None:
    """An engine of the model has just been ordered to load: tell who will not wait for so long."""
    if model.queue.first_deadline() > deadlines.ready_after(pool, model):
        return
    for waiter in list(model.queue):
        refusal = _too_late(pool, waiter, now)
        if refusal is not None:
            refuse_or_reroute(pool, waiter, now, refusal)


def _queue_full(pool: Pool, waiter: Waiter, model: Model, now: float) -> None:
    """Refuse for load, and say honestly where the request would have stood, and for how long."""
    wait_s = estimate.wait_s(pool, model, waiter.priority, now)
    pool.reject(
        waiter.request,
        waiter.holder,
        "QueueFull",
        f"too many requests wait for {model.name!r}",
        retry_after=min(MAX_RETRY_AFTER_S, max(1.0, wait_s)),
        queue_position=1 + sum(model.queue.counts[: waiter.priority]),
        expected_wait_s=round(wait_s, 1),
        overloaded=wait_s > policy.bound_s(pool, model, waiter.priority),
    )


def next_fallback(pool: Pool, waiter: Waiter) -> Model | None:
    """The next configured fallback of a request, each tried once."""
    while waiter.fallbacks:
        name, waiter.fallbacks = waiter.fallbacks[0], waiter.fallbacks[1:]
        model = pool.models.get(name)
        if model is not None and model is not waiter.model:
            return model
    return None


def refuse_or_reroute(pool: Pool, waiter: Waiter, now: float, error: policy.Refusal) -> None:
    """A model became unavailable: its waiter goes to a fallback that is available, or is rejected."""
    pool.dequeue(waiter)
    pool.touched[waiter.model] = None
    while (other := next_fallback(pool, waiter)) is not None:
        if policy.unavailable(pool, other, now) is None:
            again = Waiter(
                waiter.request,
                waiter.holder,
                other,
                waiter.priority,
                waiter.deadline,
                waiter.keep_alive_s,
                now,
                waiter.slots,
            )
            again.arrived = waiter.arrived
            again.fallbacks = waiter.fallbacks
            pool.enqueue(again, now)
            pool.touched[other] = None
            return
    pool.reject(waiter.request, waiter.holder, error.name, error.message, **error.extras)


def lease_released(pool: Pool, event: LeaseReleased, now: float) -> None:
    lease = pool.leases.get(event.request)
    if lease is None or lease.generation != event.generation:
        # The request is not remembered as cancelled: a release carries the number of a grant, so its arrival came
        # before it, and the same request may rightly come back after its replica was lost. The lease is remembered,
        # since after a restart of the ledger its re-announcement may be slower than its release.
        log.info("release of unknown lease %s/%s ignored", event.request, event.generation)
        pool.released.add(f"{event.request}/{event.generation}", now)
        drop_orphan(pool, event.request, event.generation)
        return
    if lease.generation <= pool.inherited:
        # Its re-announcement may come a second time.
        pool.released.add(f"{event.request}/{event.generation}", now)
    model = lease.replica.model
    took = now - lease.granted_at
    model.service_s += 0.1 * (took - model.service_s) if model.service_s else took
    model.drain_s = took if took > model.drain_s else model.drain_s + 0.02 * (took - model.drain_s)
    if not pool.drained:
        pool.drain_s = max(pool.drain_s, took)
    replica = lease.replica
    next_lease = model.queue.head() if replica.state is READY and pool.recovering_until is None else None
    # Only slots for slots: the tree serves a head that wants more, or fewer, than are given back here.
    if next_lease is None or len(lease.slots) != min(next_lease.slots, replica.slots):
        pool.release(lease, now)
        return
    pool.announce(pool.hand_over(lease, next_lease, now, policy.split_wait(model, next_lease, now)))
    model.keep_alive_s = next_lease.keep_alive_s
    # Who comes after a wide one may find slots that were free before it already.
    if model.free or model.pending_rank is not None or model.claim is not None or model.rising:
        pool.touched[model] = None


def serve(pool: Pool, model: Model, now: float) -> None:
    """Grant free slots to the best waiters of a model.

    The first in line is not overtaken: while it waits for more slots than any replica has free, so do those behind
    it. Slots that end stay free until there are enough, so it cannot starve.
    """
    queue = model.queue
    while (waiter := queue.head()) is not None and (replica := model.with_room(waiter.slots)) is not None:
        pool.dequeue(waiter)
        waits = policy.split_wait(model, waiter, now)
        slots = min(waiter.slots, replica.slots)
        lease = pool.lease(waiter.request, waiter.holder, replica, waiter.priority, now, waits, slots=slots)
        pool.announce(lease)
        model.keep_alive_s = waiter.keep_alive_s
        pool.touched[model] = None


def request_cancelled(pool: Pool, event: RequestCancelled, now: float) -> None:
    waiter = pool.waiters.get(event.request)
    if waiter is not None:
        pool.dequeue(waiter)
        pool.touched[waiter.model] = None
        pool.finished += 1
    elif (lease := pool.leases.get(event.request)) is not None:
        pool.release(lease, now)
        pool.touched[lease.replica.model] = None
    else:
        drop_orphan(pool, event.request, None)
        log.info("cancellation of unknown request %s remembered", event.request)
    # The arrival may still be on its way, or come a second time; nobody waits for it any more.
    pool.cancelled.add(event.request, now)


def drop_orphan(pool: Pool, request: str, generation: int | None) -> None:
    """Forget a re-announced lease whose replica has not come yet."""
    for orphans in pool.orphans.values():
        event = orphans.get(request)
        if event is not None and generation in (None, event.generation):
            del orphans[request]
