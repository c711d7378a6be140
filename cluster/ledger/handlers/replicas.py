"""What replica processes do: start, get ready, fail, vanish. The outside acts late, twice, or unasked."""

from __future__ import annotations

import logging

from cluster.ledger.books import stops
from cluster.ledger.books.pool import Pool
from cluster.ledger.books.queue import INFINITY
from cluster.ledger.books.records import Model, Replica
from cluster.ledger.events import (
    ReplicaFailed,
    ReplicaGone,
    ReplicaReady,
    ReplicaStarted,
)
from cluster.ledger.handlers.engines import PATIENCE, back_off
from cluster.ledger.handlers.holders import lease_reannounced
from cluster.ledger.rules import policy
from cluster.ledger.states import Cause, ReplicaState

log = logging.getLogger(__name__)

MAX_EARLY = 1024


def replica_started(pool: Pool, event: ReplicaStarted, now: float) -> None:
    if event.replica in pool.replicas or event.replica in pool.dead_replicas:
        log.info("replica %s announced itself again, or is dead", event.replica)
        return
    model = pool.models.get(event.model)
    if model is None:
        log.error("replica %s of unknown model %s is not accounted for", event.replica, event.model)
        return
    replica = next((each for each in model.in_state(ReplicaState.STARTING) if each.uid is None), None)
    if replica is not None:
        if replica.place.node != event.node:
            pool.book.credit(replica)
            replica.place = pool.book.force(event.node, replica.place.shape)
            pool.book.take(replica)
            pool.book.excuse(event.node)
        pool.bind(replica, event.replica, event.started_at, event.loading, now)
    else:
        replica = _adopt(pool, model, event, now)
    if event.devices:
        _stand_where_it_is(pool, replica, event.devices)
    early = pool.early_ready.pop(event.replica, None)
    if early is not None:
        replica_ready(pool, early, now)


def _adopt(pool: Pool, model: Model, event: ReplicaStarted, now: float) -> Replica:
    """Account for a process that nobody asked for; keep it only if it is of use and there is room."""
    account = pool.book.nodes.get(event.node)
    fits = account is not None and account.fit(model.shape, pool.book.hosts(model.shape)) is not None
    keep = pool.is_recovering or (
        fits
        and model.desired < model.spec.max_replicas
        and not (model.removed or model.unloading or model.held_down)
        and not (model.leaving or model.claim or now < model.backoff_until)
        and policy.has_capacity(pool, model)
    )
    replica = pool.place(model, pool.book.force(event.node, model.shape), now)
    replica.adopted = True
    pool.bind(replica, event.replica, event.started_at, event.loading, now)
    level = logging.INFO if pool.is_recovering else logging.WARNING
    log.log(level, "replica %s of %s was not asked for: %s", event.replica, model.name, "kept" if keep else "stopped")
    if not keep and stops.certain_starts(pool.book, model, [replica]):
        pool.withdraw(replica, now, "unasked")
        model.resend = True
    elif not keep:
        # Serve would stop another one that serves: it stays without an engine until that one has left.
        pool.move(replica, Cause.FAILED, now, "unasked")
    return replica


def replica_ready(pool: Pool, event: ReplicaReady, now: float) -> None:
    replica = pool.replicas.get(event.replica)
    if replica is None:
        if event.replica not in pool.dead_replicas and len(pool.early_ready) < MAX_EARLY:
            pool.early_ready[event.replica] = event
        return
    if replica.state is not ReplicaState.STARTING:
        # One that was suspected and answers does not hang; it may be suspected again.
        replica.suspected = False
        log.info("%r is ready: ignored", replica)
        return
    replica.address, replica.devices = event.address, event.devices
    replica.load_due = INFINITY
    replica.has_engine, replica.suspected = True, False
    model = replica.model
    took = now - replica.since
    # A load in place is no measure of a swap.
    if not replica.adopted and not replica.deaths:
        model.load_s = took if model.load_s is None else model.load_s + 0.3 * (took - model.load_s)
    model.loaded_at = replica.loaded_at = now
    model.last_load.append((replica.since, now))
    model.failures = 0
    model.refusing = False
    model.last_error = None
    model.ever_loaded = True
    if event.memory_mib is not None:
        _measure(pool, replica, event.memory_mib)
    if event.devices is not None:
        _stand_where_it_is(pool, replica, pool.book.node(replica.place.node).indexes(event.devices))
    pool.move(replica, Cause.LOADED, now)
    model.peak, model.peak_since = model.leased, now
    for orphan in list(pool.orphans.pop(event.replica, {}).values()):
        lease_reannounced(pool, orphan, now)


def _measure(pool: Pool, replica: Replica, memory_mib: int) -> None:
    """What was seen replaces what was guessed: for this replica, and for the model's next ones the peak of all."""
    model = replica.model
    model.measured_mib = max(memory_mib, model.measured_mib or 0)
    model.reshape()
    pool.book.reseat(replica, replica.place._replace(shape=replica.place.shape._replace(memory=memory_mib)))


def _stand_where_it_is(pool: Pool, replica: Replica, real: tuple[int, ...] | None) -> None:
    """The devices that an engine really has are the truth, as after a restart of the ledger, which has to guess."""
    place = replica.place
    if not real or len(real) != place.shape.devices or real == place.devices:
        return
    level = logging.INFO if replica.adopted else logging.WARNING
    log.log(level, "%r is on devices %s, not on %s", replica, real, place.devices)
    replica.strayed = True
    pool.book.node(place.node).widen(real[-1] + 1)
    pool.book.reseat(replica, place._replace(devices=real))


def replica_failed(pool: Pool, event: ReplicaFailed, now: float) -> None:
    replica = pool.replicas.get(event.replica)
    if replica is None or replica.state not in (ReplicaState.STARTING, ReplicaState.READY, ReplicaState.DRAINING):
        log.info("failure of replica %s ignored: unknown or leaving", event.replica)
        return
    pool.revoke(replica, now)
    pool.move(replica, Cause.FAILED, now)
    back_off(pool, replica.model, event.reason, now)


def replica_gone(pool: Pool, event: ReplicaGone, now: float) -> None:
    replica = pool.replicas.get(event.replica)
    pool.dead_replicas.add(event.replica, now)
    pool.early_ready.pop(event.replica, None)
    if replica is None:
        pool.orphans.pop(event.replica, None)
        log.info("unknown replica %s is gone", event.replica)
        return
    before = replica.state
    pool.revoke(replica, now)
    pool.move(replica, Cause.GONE, now)
    if before is ReplicaState.STARTING:
        model = replica.model
        back_off(pool, model, "the process died while it loaded", now, patient=model.failures + 1 < PATIENCE)
