"""What replica processes do: start, get ready, fail, vanish. The outside acts late, twice, or unasked."""

from __future__ import annotations

import logging

from cluster.ledger.books import engine_moves, stops
from cluster.ledger.books.pool import Pool
from cluster.ledger.books.queue import INFINITY
from cluster.ledger.books.records import Model, Replica, learned
from cluster.ledger.events import (
    ReplicaFailed,
    ReplicaGone,
    ReplicaReady,
    ReplicaStarted,
    ReplicaStopping,
)
from cluster.ledger.handlers import starts
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
    replica = _expected(pool, model, event)
    kept = replica is not None or _is_of_use(pool, model, event, now)
    if replica is None:
        replica = _adopt(pool, model, event, kept, now)
    pool.bind(replica, event.replica, event.started_at, now, "" if kept else "unasked")
    if not pool.keeps_replicas:
        pool.book.rebook(replica, event.booked)
        starts.replan(pool, replica, now, is_new=not (event.loading or event.unloading))
    _weigh(pool, replica, event)
    if not (kept or replica.is_placed) and stops.certain(pool.book, model, [replica]):
        # Its count is not raised for it, least of all beside one that Serve has yet to stop.
        pool.move(replica, Cause.DISMISSED, now, "unasked")
    if event.devices and replica.is_placed:
        _stand_where_it_is(pool, replica, event.devices)
    if replica.is_placed and kept:
        is_busy = event.loading or event.unloading
        engine_moves.assign(pool, replica, now, due=INFINITY if is_busy else None)
        if event.unloading:
            engine_moves.unload(pool, replica, Cause.WITHDRAWN, now)
    if event.stopping:
        _told_to_stop(pool, replica)
    early = pool.early_ready.pop(event.replica, None)
    if early is not None:
        replica_ready(pool, early, now)


def replica_stopping(pool: Pool, event: ReplicaStopping, now: float) -> None:
    """Serve stops it, asked or not: nobody new gets in, and its model can be started again beside it."""
    replica = pool.replicas.get(event.replica)
    if replica is None:
        log.info("unknown replica %s is to stop", event.replica)
        return
    _told_to_stop(pool, replica)


def _told_to_stop(pool: Pool, replica: Replica) -> None:
    if replica.told_to_stop:
        return
    model = replica.model
    replica.told_to_stop = True
    replica.model.before.clear()
    if replica.state is not ReplicaState.STOPPING:
        model.told_to_stop += 1
    pool.touched[model] = None
    pool.changed[model] = None


def _expected(pool: Pool, model: Model, event: ReplicaStarted) -> Replica | None:
    """The record of which this is the process, put on the node where it really is; None if none was asked for."""
    asked_for = list(model.in_state(ReplicaState.STARTING))
    if not asked_for:
        return None
    node = event.node
    replica = min(asked_for, key=lambda each: (each.place.node != node, not each.is_placed))
    if replica.place.node == node:
        return replica
    if not pool.keeps_replicas:
        pool.book.reseat(replica, pool.book.force(node, replica.place.shape, event.booked))
        return replica
    place = pool.book.node(node).fit(replica.place.shape, pool.book.hosts(model.shape)) if replica.is_placed else None
    if place is None:
        # Its model gets a place anew, here or elsewhere.
        engine_moves.unseat(pool, replica, node)
    else:
        pool.book.move(replica, place)
    return replica


def _is_of_use(pool: Pool, model: Model, event: ReplicaStarted, now: float) -> bool:
    """Whether a process that nobody asked for is kept: if there is room for it, and something for it to do."""
    # One that comes after the window, with streams on it, is one that this pool had.
    if pool.is_recovering or event.replica in pool.orphans:
        return True
    if model.removed or model.unloading or model.held_down or model.leaving:
        return False
    if model.desired >= model.spec.max_replicas:
        return False
    if pool.keeps_replicas:
        return True
    if model.counts[ReplicaState.DRAINING]:
        # Serve would stop the newer one first, and those that make room for others would stay.
        return False
    account = pool.book.nodes.get(event.node)
    hosts = pool.book.hosts(model.shape)
    fits = account is not None and account.fit(model.shape, hosts, event.booked or None) is not None
    return fits and not (model.claim or now < model.backoff_until) and policy.has_capacity(pool, model)


def _adopt(pool: Pool, model: Model, event: ReplicaStarted, kept: bool, now: float) -> Replica:
    """Account for a process that nobody asked for."""
    level = logging.INFO if pool.is_recovering else logging.WARNING
    log.log(level, "replica %s of %s was not asked for: %s", event.replica, model.name, "kept" if kept else "stopped")
    has_engine = event.loading or event.unloading
    if has_engine or not pool.keeps_replicas:
        # Ray keeps its devices for it until it is gone. Memory it takes only if it has an engine, or is to get one.
        shape = model.shape if has_engine or kept else model.shape._replace(memory=0)
        replica = pool.place(model, pool.book.force(event.node, shape, event.booked), now)
    else:
        replica = pool.place(model, pool.asleep_place(event.node), now, for_engine=False)
    replica.adopted = True
    model.resend = model.resend or not kept
    return replica


def _weigh(pool: Pool, replica: Replica, event: ReplicaStarted) -> None:
    """Book what a process has told that it, and an engine that sleeps in it, hold."""
    if event.host_mib:
        pool.asleep_mib = replica.host_mib = event.host_mib
    if replica.is_placed:
        return
    if event.asleep_mib is None:
        pool.book.move(replica, pool.asleep_place(replica.place.node, replica.host_mib))
    else:
        engine_moves.lay_down(pool, replica, *event.asleep_mib, event.devices)


def replica_ready(pool: Pool, event: ReplicaReady, now: float) -> None:
    replica = pool.replicas.get(event.replica)
    if replica is None:
        if event.replica not in pool.dead_replicas and len(pool.early_ready) < MAX_EARLY:
            pool.early_ready[event.replica] = event
        return
    if replica.state is ReplicaState.ASLEEP and not replica.is_placed:
        # A former life of the ledger has ordered it, or it was taken for one that had failed: it must not stay.
        if not replica.engine_sleeps:
            devices = pool.book.node(replica.place.node).indexes(event.devices or ())
            engine_moves.hold_until_ended(pool, replica, devices)
        engine_moves.demote(pool, replica, now)
    if replica.state is not ReplicaState.LOADING:
        # One that was suspected and answers does not hang; it may be suspected again.
        replica.suspected = False
        log.info("%r is ready: ignored", replica)
        return
    if replica.adopted and event.slots:
        # The streams of a former life run on the slots that there were when it was loaded.
        replica.resize(event.slots)
    if replica.adopted and event.revision is not None:
        replica.revision = (event.revision, replica.slots, *replica.model.revision[2:])
    model = replica.model
    if replica.ordered and replica.order_due == INFINITY and not replica.wakes:
        model.loads_seen += 1
        model.fastest_load_s = min(model.fastest_load_s, now - replica.order_began)
    replica.address, replica.devices, replica.row = event.address, event.devices, None
    replica.order_due = INFINITY
    replica.has_engine, replica.suspected = True, False
    # A process that stays is started once: a swap does not pay for that.
    took = now - (replica.order_began if pool.keeps_replicas else replica.wanted_at)
    if replica.wakes:
        model.wake_s = learned(model.wake_s, took)
        replica.wakes = False
    elif not replica.adopted and not replica.deaths:
        # A load in place is no measure of a swap.
        model.load_s = learned(model.load_s, took)
    model.loaded_at = replica.loaded_at = now
    model.last_load.append((replica.wanted_at, now))
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
    """What was seen replaces what was guessed: for this replica, and for the next ones the peak of all that run."""
    model = replica.model
    alone = not any(each.has_engine for each in model.replicas if each is not replica)
    model.measured_mib = memory_mib if alone else max(memory_mib, model.measured_mib or 0)
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
    if replica is None or replica.state not in (ReplicaState.LOADING, ReplicaState.READY, ReplicaState.DRAINING):
        log.info("failure of replica %s ignored: unknown or leaving", event.replica)
        return
    if replica.wakes:
        engine_moves.give_up_waking(pool, replica, now)
        return
    pool.revoke(replica, now)
    engine_moves.lose(pool, replica, Cause.FAILED, now)
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
    if before is ReplicaState.LOADING:
        model = replica.model
        back_off(pool, model, "the process died while it loaded", now, patient=model.failures + 1 < PATIENCE)
