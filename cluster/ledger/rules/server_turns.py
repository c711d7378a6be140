"""Whose turn it is on an external server, and the just-in-time guard.

A server that loads models just in time swaps as soon as it is asked for another model, and cuts what still runs. So
while it holds a lease it gets requests for that lease's model only, and when others wait, it must be drained (see
`next_model`): at zero leases the others get in. All of this is decided when a slot is free or becomes free, so no
timer is needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.ledger.books.queue import INFINITY
from cluster.ledger.books.records import Model
from cluster.ledger.books.servers import Server
from cluster.ledger.rules import policy

if TYPE_CHECKING:
    from cluster.ledger.books.pool import Pool


def next_model(pool: Pool, server: Server, now: float) -> Model | None:
    """For which model's waiter the free slot of a server is meant; None if nobody's, or if it must run empty first.

    First come, first served within a class and high before low, like everywhere. The *resident* model (the one that
    runs, or ran last) is let past the others, for every swap costs a load, until

    * one of them waits for as long as its class may (`due_at`), or
    * one of them is of a higher class than whoever would be let past, or,
    * where the server is empty, its first request since the swap ended `server_batch_s` ago.

    If the resident model's own waiters are due too, it stays for `server_turn_s` after a swap; after that
    the longest due goes first. Nobody starves: whoever is due is passed only by those who are due still longer.
    """
    waiting = [pool.models[name] for name in server.models if pool.models[name].queue.count]
    if not waiting:
        return None
    due = {model: due_at(pool, server, model) for model in waiting}
    overdue = [model for model in waiting if due[model] <= now]
    best = min(overdue, key=lambda model: due[model]) if overdue else min(waiting, key=rank)
    if not server.spec.just_in_time:
        return best
    resident = pool.models.get(server.current or server.last or "")
    if best is resident or resident not in waiting:
        return best if best is resident or server.current is None else None
    if overdue:
        if resident in overdue and _is_fresh(server, now, pool.spec.server_turn_s):
            return resident
    elif _class(best) >= _class(resident) and (
        server.current is not None or _is_fresh(server, now, pool.spec.server_batch_s)
    ):
        return resident
    return best if server.current is None else None


def due_at(pool: Pool, server: Server, model: Model) -> float:
    """When a server must begin to run empty so that a model's waiters get in within their bounds.

    A request that would give up before its bound has half of its time. The time that the server will take to run
    empty counts, as for replicas.
    """
    first = INFINITY
    for head in model.queue.heads():
        patience = min(policy.bound_s(pool, model, head.priority), 0.5 * (head.deadline - head.arrived))
        first = min(first, head.arrived + max(0.0, patience - policy.LEAD * server.drain_s))
    return first


def _is_fresh(server: Server, now: float, stay_s: float) -> bool:
    """The last swap is not longer ago than that; the time until its first request was over, load included, is free."""
    return server.settled_at is None or now < server.settled_at + stay_s


def rank(model: Model) -> float:
    head = model.queue.head()
    return INFINITY if head is None else head.rank


def _class(model: Model) -> int:
    head = model.queue.head()
    return 3 if head is None else head.priority


def load(pool: Pool, server: Server, model: Model) -> tuple[int, bool, int, int]:
    """Least loaded first; then who need not swap, then whom fewer others wait for, then in turn."""
    swaps = server.spec.just_in_time and server.last is not None and server.last != model.name
    rivals = sum(1 for name in server.models if pool.models[name].queue.count)
    return len(server.leases), swaps, rivals, server.turn
