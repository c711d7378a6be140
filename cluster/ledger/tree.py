"""The decision tree: grant what can be granted; place what fits; if something waits and nothing fits, choose what to
drain; stop what is idle.

It runs after every event, over the models that the event touched and no others. `settle` repeats until nothing is
touched any more; each round moves replicas along the table of `states.py`, so it ends.
"""

from __future__ import annotations

import heapq
import logging
from itertools import islice
from typing import TYPE_CHECKING

from cluster.ledger import placing, promises
from cluster.ledger.books import engine_moves, stops
from cluster.ledger.books.queue import INFINITY
from cluster.ledger.books.records import Model, Replica
from cluster.ledger.books.servers import is_remote
from cluster.ledger.events import LoadRefused
from cluster.ledger.handlers.engines import UNLOAD_LIMIT_S, give_orders, load_overdue, unload_overdue
from cluster.ledger.handlers.holders import end_left_behind
from cluster.ledger.handlers.requests import expire_waiters, refuse_or_reroute, serve
from cluster.ledger.rules import autoscale, claims, levels, policy, quiet, sleepers
from cluster.ledger.states import Cause, ReplicaState

if TYPE_CHECKING:
    from cluster.ledger.books.pool import Pool

log = logging.getLogger(__name__)

# Each round moves replicas forward, so a few are enough; a mistake must not hang the pool's one scheduler.
MAX_ROUNDS = 1000
# An event acts on no more timers of models than these. Those that are left go off at the next one, at once.
MAX_TIMERS = 64
# And no more models than these are looked at, where a configuration or a machine has changed for very many: the next
# event, which is due at once, goes on with the others.
MAX_TOUCHED = 200

STARTING, LOADING, READY = ReplicaState.STARTING, ReplicaState.LOADING, ReplicaState.READY
DRAINING, UNLOADING, ASLEEP = ReplicaState.DRAINING, ReplicaState.UNLOADING, ReplicaState.ASLEEP


def settle(pool: Pool, now: float) -> None:
    """Do all that can be done now. Mutates the pool; the commands are in `pool.out`."""
    if pool.is_recovering:
        return
    pool.undecided = False
    pool.looked = 0
    for _ in range(MAX_ROUNDS):
        if not pool.touched and (not pool.went_idle or placing.has_looked_enough(pool)):
            break
        is_crowd = len(pool.touched) > MAX_TOUCHED
        touched = list(islice(pool.touched, MAX_TOUCHED))
        for model in touched:
            del pool.touched[model]
        for model in touched:
            _trim(pool, model, now)
            if model.counts[LOADING] or model.counts[UNLOADING]:
                give_orders(pool, model, now)
            if model.free and model.queue.count:
                serve(pool, model, now)
            _review(pool, model, now)
        placing.place(pool, touched, now)
        placing.choose(pool, touched, now)
        for model in touched:
            _stop_idle(pool, model, now)
            pool.arm(model, due(pool, model))
        while pool.keeps_replicas and (first := sleepers.next_to_go(pool)) is not None:
            going, whole = first
            for replica in going:
                if whole:
                    pool.move(replica, Cause.DISMISSED, now, "max_asleep")
                else:
                    engine_moves.demote(pool, replica, now, "max_asleep")
        if is_crowd:
            break
    else:
        pool.undecided = True
        log.error("no decision after %d rounds, %d models left for the next event", MAX_ROUNDS, len(pool.touched))
    pool.is_behind = bool(pool.touched or pool.went_idle)
    pool.flush_desired()
    if pool.lacks_processes and pool.quiet_at == INFINITY:
        pool.watch_for_quiet(now)


# --- time ---------------------------------------------------------------------------------------------------------


def due(pool: Pool, model: Model) -> float:
    """The earliest time at which a model must be looked at again, other than for a waiter's deadline."""
    first = min(autoscale.idle_due(pool, model), autoscale.surplus_due(model))
    if model.rising:
        first = min(first, *(min(each.order_due, each.overdue_at()) for each in model.rising_replicas()))
    if model.counts[UNLOADING]:
        first = min(first, *(each.order_began + UNLOAD_LIMIT_S for each in model.in_state(UNLOADING)))
    if model.counts[DRAINING]:
        since = min((each.since for each in model.in_state(DRAINING) if each.leases), default=INFINITY)
        first = min(first, since + pool.spec.drain_timeout_s)
    if model.counts[ASLEEP] and model.spec.sleep_timeout_s:
        ends = (sleepers.stays_until(each) for each in model.in_state(ASLEEP))
        first = min(first, *(end for end in ends if end > pool.now), INFINITY)
    if model.claim is not None:
        first = min(first, claims.look_at(pool, model.claim))
    elif model.pending_rank is not None:
        first = min(first, model.look_at)
    elif model.queue.count:
        grows = autoscale.grows_at(pool, model)
        if grows > pool.now:
            first = min(first, grows)
    if model.order is not None and model.serving < model.order.replicas:
        first = min(first, model.order.deadline)
    if model.backoff_until > pool.now and (model.queue.count or model.order or model.floor or model.spec.preload):
        first = min(first, model.backoff_until)
    return first


def next_due(pool: Pool) -> float | None:
    """When the next model must be looked at. Timers that were overtaken are set anew, so none fires for nothing."""
    while (timer := pool.next_timer()) is not None:
        model = timer[2]
        truth = due(pool, model)
        if truth <= timer[0]:
            return timer[0]
        heapq.heappop(pool.timers)
        model.armed_at = INFINITY
        if truth < INFINITY:
            pool.arm(model, truth)
    return None


def expire(pool: Pool, now: float) -> None:
    """Act on everything whose time has come: the recovery window, deadlines, timers, what dead holders have left."""
    _expire(pool, now)
    if pool.left_behind:
        end_left_behind(pool, now)


def _expire(pool: Pool, now: float) -> None:
    if pool.recovering_until is not None and now >= pool.recovering_until:
        _end_recovery(pool, now)
    for memory in (pool.cancelled, pool.released, pool.dead_holders, pool.dead_replicas):
        memory.fade(now)
    if now >= pool.orphans_until:
        pool.orphans.clear()
        pool.orphans_until = INFINITY
    expire_waiters(pool, now)
    if pool.recovering_until is not None:
        pool.wake = min(pool.next_deadline()[0], pool.recovering_until)
        return
    for _ in range(MAX_TIMERS):
        timer = pool.next_timer()
        if timer is None or timer[0] > now:
            break
        model = timer[2]
        heapq.heappop(pool.timers)
        model.armed_at = INFINITY
        pool.touched[model] = None
        for replica in list(model.rising_replicas()):
            # The failure of one may take back the others of an order.
            if replica.is_rising and now >= replica.overdue_at():
                load_overdue(pool, replica, now)
        for replica in model.in_state(UNLOADING):
            if now >= replica.order_began + UNLOAD_LIMIT_S:
                unload_overdue(pool, replica, now)
        for replica in list(model.in_state(DRAINING)):
            if now >= replica.since + pool.spec.drain_timeout_s:
                # Far beyond the longest request allowed: these leases have no holder any more.
                pool.revoke(replica, now)
    if now >= pool.quiet_at:
        _start_quietly(pool, now)
    pool.wake = min(pool.next_deadline()[0], pool.timers[0][0] if pool.timers else INFINITY)
    pool.wake = min(pool.wake, pool.orphans_until, pool.quiet_at)


def _start_quietly(pool: Pool, now: float) -> None:
    """Where nothing has happened for a while, start a process for a model that has none."""
    pool.quiet_at = INFINITY
    if pool.submitted == pool.quiet_seen and quiet.is_quiet(pool):
        found = quiet.next_start(pool, now)
        if found is None:
            # Until something changes; one that vanished is started when it is wanted, or beside the next of these.
            pool.lacks_processes = False
            return
        model, node = found
        pool.place(model, pool.asleep_place(node.name), now, for_engine=False)
    pool.watch_for_quiet(now)


def _end_recovery(pool: Pool, now: float) -> None:
    """The recovery window closed: decide again, and say every desired count once, for Serve knows those of before."""
    pool.recovering_until = None
    for model in pool.models.values():
        # Serve knows nothing of a model that only servers offer.
        model.resend = not is_remote(model)
        pool.changed[model] = None
        pool.touched[model] = None
        if model.queue.count:
            refusal = policy.unavailable(pool, model, now)
            if refusal is None and model.spec.manual and not model.placed:
                refusal = policy.Refusal("ModelNotLoaded", f"the model {model.name!r} is not loaded", {})
            for waiter in list(model.queue) if refusal is not None else ():
                refuse_or_reroute(pool, waiter, now, refusal)  # type: ignore[arg-type]


# --- what must go, whoever waits ------------------------------------------------------------------------------------


def _trim(pool: Pool, model: Model, now: float) -> None:
    """Drain what must not serve any longer, finish what has drained, forget what has left."""
    _end_engines(pool, model, now)
    if not model.placed:
        model.unloading = False
        if model.removed and pool.models.get(model.name) is model and not (model.queue.count or model.replicas):
            _forget(pool, model)
        return
    to_drain = list(model.placed_replicas())
    if not (model.removed or model.unloading):
        to_drain = [each for each in to_drain if stops.is_outdated(pool.book, each)]
        stays = model.serving - sum(1 for each in to_drain if each.state in (STARTING, LOADING, READY))
        for _ in range(stays - model.spec.max_replicas):
            # As Serve does it: what has no process yet goes first, then the newest.
            first = stops.first_of(pool.book, model, (STARTING, LOADING, READY), gone=to_drain)
            to_drain += [first] if first is not None else []
    for replica in to_drain:
        if replica.state is READY:
            pool.quiesce(replica, now, _why_trimmed(pool, replica))
    for replica in stops.certain_starts(pool.book, model, to_drain):
        engine_moves.withdraw(pool, replica, now, _why_trimmed(pool, replica))


def _end_engines(pool: Pool, model: Model, now: float) -> None:
    """End what has drained, and have the replicas stopped that have no engine and are of no use."""
    useless: list[Replica] = []
    if model.told_to_stop:
        for replica in [each for each in model.replicas if each.told_to_stop and not each.leases]:
            # Nobody carries out orders there any more, so its engine ends with it.
            if replica.state in (LOADING, DRAINING, ASLEEP):
                replica.wakes = False
                pool.move(replica, Cause.DISMISSED, now, "stopped")
    if pool.keeps_replicas:
        for replica in list(model.in_state(DRAINING)):
            if not replica.leases and levels.may_sleep(pool, replica):
                engine_moves.put_to_sleep(pool, replica, levels.asleep_host_mib(replica), now)
            elif not replica.leases:
                engine_moves.unload(pool, replica, Cause.EMPTIED, now)
        useless = sleepers.superfluous(pool, model) if model.counts[ASLEEP] else []
    if useless or model.counts[DRAINING] or model.counts[ASLEEP]:
        # One waits for those that Serve would stop in its stead.
        for replica in stops.certain(pool.book, model, useless):
            pool.move(replica, Cause.DISMISSED, now)
    for replica in levels.unfit(pool, model) if model.sleeping else ():
        engine_moves.demote(pool, replica, now)


def _why_trimmed(pool: Pool, replica: Replica) -> str:
    """Why a replica must not serve any longer, for those who watch."""
    if replica.model.unloading:
        return "operator"
    if replica.told_to_stop:
        return "stopped"
    return "lost_node" if promises.is_on_lost_node(pool, replica) else "config"


def _forget(pool: Pool, model: Model) -> None:
    promises.drop(pool, model, pool.now)
    _not_pending(pool, model)
    pool.understaffed.pop(model, None)
    model.armed_at = INFINITY
    del pool.models[model.name]


# --- who needs a place --------------------------------------------------------------------------------------------


def _review(pool: Pool, model: Model, now: float) -> None:
    """Note whether a model needs one more replica, and take back what was begun for waiters who left."""
    order = model.order
    if order is not None:
        if model.counts[READY] >= order.replicas:
            model.order = None
        elif now >= order.deadline and model.serving < order.replicas:
            model.order = None
            message = "there was no room for all of its replicas in time"
            pool.out.append(LoadRefused(model.name, "BackendTimeout", message, {"phase": "queued"}))
    if model.counts[DRAINING] and model.queue.count and _reopen(pool, model, now):
        serve(pool, model, now)
    needed = autoscale.missing(pool, model, now)
    if not needed and model.claim is not None:
        promises.drop(pool, model, now)
    if model.counts[STARTING] and not model.queue.count:
        _withdraw_needless(pool, model, now)
    if not needed or model.claim is not None:
        _not_pending(pool, model)
    else:
        key = model.place_rank
        if key != model.pending_rank:
            if model.pending_rank is None:
                pool.pending_count += 1
                model.look_at = now
            elif key < model.pending_rank:
                model.look_at = now
            model.pending_rank = key
            pool.serial += 1
            heapq.heappush(pool.pending, (key, pool.serial, model))
    if autoscale.floor_missing(pool, model, now):
        pool.understaffed[model] = None
    else:
        pool.understaffed.pop(model, None)


def _not_pending(pool: Pool, model: Model) -> None:
    if model.pending_rank is not None:
        model.pending_rank = None
        model.look_at = INFINITY
        pool.pending_count -= 1


def _reopen(pool: Pool, model: Model, now: float) -> bool:
    """Take back a drain that nobody else counts on."""
    return any(promises.reopen_with_others(pool, replica, now) for replica in list(model.in_state(DRAINING)))


def _withdraw_needless(pool: Pool, model: Model, now: float) -> None:
    """No model loads for nobody: a start that has no process yet is taken back when its waiters have left."""
    if model.order is not None or autoscale.floor_missing(pool, model, now):
        return
    kept = max(model.floor, 1 if model.spec.preload and not model.ever_loaded else 0)
    for replica in list(model.in_state(STARTING)):
        if replica.is_placed and model.serving > kept:
            engine_moves.withdraw(pool, replica, now)


# --- idle ---------------------------------------------------------------------------------------------------------


def _stop_idle(pool: Pool, model: Model, now: float) -> None:
    """Close what nobody used for long enough, in the order in which Serve will stop it."""
    while now >= autoscale.idle_due(pool, model):
        replica = stops.first_of(pool.book, model, (READY,))
        if replica is None:
            # Serve may stop any of them first, and all of them are idle.
            for each in list(model.in_state(READY)):
                pool.quiesce(each, now, "idle_timeout")
            return
        if replica.leases or now < replica.idle_since + model.idle_timeout_s:
            # It goes in the stead of an older one, which takes over its part: its idleness begins anew.
            pool.rest(next(iter(model.buckets[0])), now)
        pool.quiesce(replica, now, "idle_timeout")
    if now >= autoscale.surplus_due(model):
        replica = autoscale.close_surplus(pool, model, now)
        if replica is not None:
            pool.quiesce(replica, now, "surplus")
