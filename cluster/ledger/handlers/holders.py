"""What the holders of leases do: die, say what they hold, and come back after a restart of the ledger."""

from __future__ import annotations

import logging

from cluster.ledger.books.pool import Pool
from cluster.ledger.books.records import Lease, Waiter
from cluster.ledger.events import HolderAnnounced, HolderDied, LeaseReannounced
from cluster.ledger.states import ReplicaState

log = logging.getLogger(__name__)

READY = ReplicaState.READY

#: How many requests are looked at for being a dead holder's, and how many of his are ended, at one event. The next one,
#: which is due at once, goes on with the others.
MAX_LOOKED = 20_000
MAX_ENDED = 500
MAX_ORPHANS = 10_000
#: For so long after the last of them, in seconds, their replicas may come: also when the recovery window has closed.
ORPHAN_S = 60.0


def holder_died(pool: Pool, event: HolderDied, now: float) -> None:
    pool.dead_holders.add(event.holder, now)
    pool.holders.discard(event.holder)
    for orphans in pool.orphans.values():
        for request in [each.request for each in orphans.values() if each.holder == event.holder]:
            del orphans[request]
    # A pass over everything, since holders are few, die seldom, and hold a good part of it; an index by holder would
    # cost every single request four dictionary operations.
    # It takes a few events: none is to look at a hundred thousand requests.
    requests: list[Waiter | Lease] = [*pool.waiters.values(), *pool.leases.values()]
    requests.reverse()
    pool.left_behind.append((event.holder, requests))
    end_left_behind(pool, now)


def end_left_behind(pool: Pool, now: float) -> None:
    """End what a dead holder waited for and held: all of it, or if there is very much in the pool, a part of it.

    Who waited may have been granted meanwhile, to nobody, and a lease may have been lost with its replica.
    """
    holder, requests = pool.left_behind[0]
    ended = 0
    for _ in range(min(MAX_LOOKED, len(requests))):
        each = requests.pop()
        if each.holder == holder:
            _end(pool, each.request, holder, now)
            ended += 1
        if ended == MAX_ENDED:
            break
    if not requests:
        pool.left_behind.popleft()
    if pool.left_behind:
        pool.wake = now


def _end(pool: Pool, request: str, holder: str, now: float) -> None:
    waiter, lease = pool.waiters.get(request), pool.leases.get(request)
    if waiter is not None and waiter.holder == holder:
        pool.dequeue(waiter)
        pool.finished += 1
        pool.touched[waiter.model] = None
    elif lease is not None and lease.holder == holder:
        pool.release(lease, now)
        pool.touched[lease.replica.model] = None


def lease_reannounced(pool: Pool, event: LeaseReannounced, now: float) -> None:
    # The replica says which model it is; the event may name an alias, or what was asked for before a fallback.
    if event.request in pool.leases or event.holder in pool.dead_holders:
        log.info("re-announced lease %s ignored: known already, or of nobody", event.request)
        return
    ended = f"{event.request}/{event.generation}" in pool.released
    if ended or event.request in pool.cancelled or event.replica in pool.dead_replicas:
        log.info("re-announced lease %s ignored: it has ended", event.request)
        return
    replica = pool.replicas.get(event.replica)
    if replica is None or replica.is_rising:
        if sum(map(len, pool.orphans.values())) < MAX_ORPHANS:
            pool.orphans.setdefault(event.replica, {})[event.request] = event
            pool.orphans_until = now + ORPHAN_S
        return
    if replica.state is not READY or not replica.free:
        log.warning("re-announced lease %s ignored: %r cannot hold it", event.request, replica)
        return
    waiter = pool.waiters.get(event.request)
    if waiter is not None:
        pool.dequeue(waiter)
    else:
        pool.submitted += 1
    pool.inherited = max(pool.inherited, event.generation)
    pool.generation = max(pool.generation, event.generation)
    # What it holds is what its replica can still give, should the configuration have fewer slots now.
    slots = min(event.slots, len(replica.free))
    pool.lease(event.request, event.holder, replica, event.priority, now, generation=event.generation, slots=slots)
    pool.touched[replica.model] = None


def holder_announced(pool: Pool, event: HolderAnnounced, now: float) -> None:
    """End what the ledger has for a holder that the holder knows nothing of: its release, or cancellation, was lost.

    A grant that is still on its way to the holder is safe: the holder has asked for it and lists it as waiting. What
    it asked for after this announcement reaches the ledger after it, for the messages of one holder keep their order.
    A lease of which only the holder knows is not taken from here, but from its `LeaseReannounced`.
    """
    if event.holder in pool.dead_holders:
        return
    if event.holder not in pool.holders:
        pool.holders.add(event.holder)
        pool.watch_for_quiet(now)
    held, waiting = set(event.leases), set(event.waiting)
    known = waiting.union(request for request, _ in held)
    for orphans in pool.orphans.values():
        for lost in [each for each in orphans.values() if each.holder == event.holder and each.request not in known]:
            del orphans[lost.request]
    holder = event.holder
    for waiter in [each for each in pool.waiters.values() if each.holder == holder and each.request not in known]:
        log.warning("request %s is not known to its holder any more, cancelled", waiter.request)
        pool.dequeue(waiter)
        pool.finished += 1
        pool.touched[waiter.model] = None
        pool.cancelled.add(waiter.request, now)
    for lease in [each for each in pool.leases.values() if each.holder == holder]:
        if lease.request not in waiting and (lease.request, lease.generation) not in held:
            log.warning("lease %s is not known to its holder any more, released", lease.request)
            _forget_late(pool, lease, now)
            pool.release(lease, now)
            pool.touched[lease.replica.model] = None


def _forget_late(pool: Pool, lease: Lease, now: float) -> None:
    """Its re-announcement may come a second time, if it is of a former epoch."""
    if lease.generation <= pool.inherited:
        pool.released.add(f"{lease.request}/{lease.generation}", now)
