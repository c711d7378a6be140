"""What becomes of the engines inside the replicas: they are ordered to load, hang, die, and load again in place."""

from __future__ import annotations

import logging

from cluster.ledger.books import engine_moves, stops
from cluster.ledger.books.pool import Pool
from cluster.ledger.books.queue import INFINITY
from cluster.ledger.books.records import Model, Replica
from cluster.ledger.events import (
    EndReplica,
    EngineAsleep,
    EngineDied,
    EngineUnloaded,
    LoadEngine,
    ReplicaSuspected,
    RestartEngine,
    SleepEngine,
    UnloadEngine,
    WakeEngine,
)
from cluster.ledger.handlers.requests import refuse_or_reroute, turn_away_late
from cluster.ledger.rules import policy
from cluster.ledger.states import Cause, ReplicaState

log = logging.getLogger(__name__)

LOADING, READY, DRAINING = ReplicaState.LOADING, ReplicaState.READY, ReplicaState.DRAINING
UNLOADING, ASLEEP = ReplicaState.UNLOADING, ReplicaState.ASLEEP

# A process that dies while it loads (a node that went down, an out-of-memory kill), and an engine that dies again and
# again, are tried this often before the waiters are refused; an engine that *says* that it cannot load is believed at
# once.
PATIENCE = 3
# For so long an engine that was told to end may take, in seconds, before its replica is taken to hang.
UNLOAD_LIMIT_S = 30.0
# An engine that served for so long has not died of its load: the count of its deaths begins anew.
STEADY_S = 60.0


def give_orders(pool: Pool, model: Model, now: float) -> None:
    """Tell the replicas of a model whose time has come to load, wake, put to sleep or end their engines."""
    for replica in list(model.in_state(LOADING)):
        # The failure of one may take back the others of an order.
        if replica.state is LOADING and now >= replica.order_due:
            _order_load(pool, replica, now)
    for replica in model.in_state(UNLOADING):
        if now >= replica.order_due:
            assert replica.uid is not None, "an UNLOADING replica has a process"
            replica.order_due = INFINITY
            order = SleepEngine if replica.falls_asleep else UnloadEngine
            pool.out.append(order(model.name, replica.uid))


def _order_load(pool: Pool, replica: Replica, now: float) -> None:
    model = replica.model
    assert replica.uid is not None, "a LOADING replica has a process"
    if replica.wakes:
        replica.order_due, replica.order_began, replica.ordered = INFINITY, now, True
        pool.out.append(WakeEngine(model.name, replica.uid, replica.place.devices))
        return
    if not pool.book.settle_devices(replica):
        # It started on another node than planned, or beside what nobody asked for, and there is no room for it. That
        # is no failure of the model: Ray may choose better the next time.
        engine_moves.lose(pool, replica, Cause.FAILED, now)
        failures = model.failures
        back_off(pool, model, "no device where it was started is free for it", now, patient=True)
        model.failures = failures
        return
    replica.order_due = INFINITY
    replica.order_began = now
    replica.ordered = True
    pool.out.append(LoadEngine(replica.uid, model.name, replica.place.devices))
    turn_away_late(pool, model, now)


def engine_died(pool: Pool, event: EngineDied, now: float) -> None:
    """The engine is dead and its replica lives: what it ran has ended, what waits goes on waiting."""
    replica = pool.replicas.get(event.replica)
    pool.early_ready.pop(event.replica, None)
    if replica is None or replica.state not in (LOADING, READY, DRAINING):
        log.info("death of an engine of replica %s ignored: unknown or leaving", event.replica)
        return
    if replica.wakes:
        engine_moves.give_up_waking(pool, replica, now)
        return
    pool.revoke(replica, now)
    replica.has_engine = replica.suspected = False
    model, before = replica.model, replica.state
    if before is DRAINING:
        # A dead engine is not opened again.
        engine_moves.lose(pool, replica, Cause.ENGINE_DIED, now)
        return
    replica.deaths = 1 if before is READY and now >= replica.since + STEADY_S else replica.deaths + 1
    failures = replica.deaths if before is READY else max(replica.deaths, model.failures + 1)
    if failures >= PATIENCE:
        engine_moves.lose(pool, replica, Cause.FAILED, now)
        back_off(pool, model, event.reason, now)
        return
    pool.move(replica, Cause.ENGINE_DIED, now)
    if before is READY:
        replica.wanted_at = now
    if before is READY and replica.deaths == 1:
        model.last_error = event.reason
        engine_moves.assign(pool, replica, now)
    else:
        back_off(pool, model, event.reason, now, patient=True)
        engine_moves.assign(pool, replica, now, due=model.backoff_until)


def engine_unloaded(pool: Pool, event: EngineUnloaded, now: float) -> None:
    """The engine has ended as ordered, instead of falling asleep, or asleep: what it took is free."""
    replica = pool.replicas.get(event.replica)
    if replica is not None and replica.adopted and replica.state in (READY, DRAINING):
        # A former life of the ledger gave the order, and it reached the replica after it had announced its engine.
        engine_died(pool, EngineDied(event.replica, "an order of the ledger's former life ended it"), now)
        return
    if replica is None or not (replica.state is UNLOADING or replica.engine_sleeps):
        log.info("end of the engine of replica %s ignored: unknown, or not ordered", event.replica)
        return
    replica.order_due = INFINITY
    replica.falls_asleep = False
    pool.move(replica, Cause.UNLOADED, now)
    engine_moves.unseat(pool, replica)


def unload_overdue(pool: Pool, replica: Replica, now: float) -> None:
    """An engine that was told to end is still there, for all that is known: its replica hangs, and is ended.

    One that was told to sleep is told to end first.
    """
    assert replica.uid is not None, "an UNLOADING replica has a process"
    replica.order_began = now
    if replica.falls_asleep:
        replica.falls_asleep, replica.order_due = False, now
        return
    pool.out.append(EndReplica(replica.uid))


def engine_asleep(pool: Pool, event: EngineAsleep, now: float) -> None:
    """The engine sleeps as ordered: what it took is free, but for what it has told."""
    replica = pool.replicas.get(event.replica)
    if replica is not None and replica.falls_asleep:
        engine_moves.slept(pool, replica, event.host_mib, event.device_mib, now)
        return
    log.info("the engine of replica %s sleeps: ignored, since nobody told it to", event.replica)
    if replica is not None and replica.state is ASLEEP and not (replica.engine_sleeps or replica.is_placed):
        pool.out.append(UnloadEngine(replica.model.name, event.replica))


def replica_suspected(pool: Pool, event: ReplicaSuspected, now: float) -> None:
    """An engine that hangs is killed, once; its death is then an event of its own."""
    replica = pool.replicas.get(event.replica)
    if replica is None or not replica.has_engine or not replica.state.may_hold_leases or replica.suspected:
        log.info("suspicion against replica %s ignored: unknown, not serving, or known", event.replica)
        return
    replica.suspected = True
    pool.out.append(RestartEngine(event.replica))


def load_overdue(pool: Pool, replica: Replica, now: float) -> None:
    """A load takes too long: as if it had failed, but its waiters hear of a timeout. A waking is given up."""
    model = replica.model
    if replica.wakes:
        engine_moves.give_up_waking(pool, replica, now)
        return
    reason = f"not loaded within {model.spec.load_timeout_s:g} s"
    if replica.uid is None:
        # Without a process there is nobody whose death could be waited for.
        pool.move(replica, Cause.GONE, now)
    elif pool.keeps_replicas:
        engine_moves.unload(pool, replica, Cause.WITHDRAWN, now, "load_timeout")
    else:
        engine_moves.lose(pool, replica, Cause.FAILED, now)
    back_off(pool, model, reason, now, error="BackendTimeout")


def back_off(
    pool: Pool, model: Model, reason: str, now: float, *, error: str = "ModelUnavailable", patient: bool = False
) -> None:
    """A load failed: pause, take an operator's order back as a whole, and refuse those who wait in vain."""
    first, longest = pool.spec.backoff_s
    model.backoff_until = now + min(longest, first * 2.0 ** min(model.failures, 30))
    model.failures += 1
    model.last_error = reason
    model.refusing = not patient
    if model.order is not None and not patient:
        batch = list(model.order.batch)
        model.order = None
        for replica in stops.certain_starts(pool.book, model, batch):
            engine_moves.withdraw(pool, replica, now)
        for replica in batch:
            if replica.state is READY:
                pool.quiesce(replica, now, "operator")
    if model.refusing and not model.serving:
        refusal = policy.failure(model, now, error)
        for waiter in list(model.queue):
            refuse_or_reroute(pool, waiter, now, refusal)
    pool.touched[model] = None
