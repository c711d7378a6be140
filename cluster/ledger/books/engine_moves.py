"""The primitive moves of engines in their replicas, on the pool's books: they get a place, load, end. None decides.

Where the pool keeps no replicas without engines, what an engine took stays booked until its replica is gone.
"""

from __future__ import annotations

from cluster.ledger.books.pool import Pool
from cluster.ledger.books.queue import INFINITY
from cluster.ledger.books.records import Replica
from cluster.ledger.books.shapes import Place
from cluster.ledger.states import Cause, ReplicaState


def seat(pool: Pool, replica: Replica, place: Place, now: float) -> None:
    """Give a replica without an engine, or one that is still to come, an engine's place; one that is here loads."""
    model = replica.model
    replica.revision = model.revision
    replica.resize(model.spec.slots)
    replica.deaths = 0
    replica.adopted = replica.strayed = replica.ordered = False
    replica.wanted_at = replica.order_began = now
    pool.book.move(replica, place)
    pool.set_placed(replica, True)
    if replica.state is ReplicaState.ASLEEP:
        assign(pool, replica, now)


def assign(pool: Pool, replica: Replica, now: float, due: float | None = None) -> None:
    """A replica loads its engine on its place, and is to be ordered to at `due`; at once without."""
    replica.order_began = now
    replica.order_due = now if due is None else due
    pool.move(replica, Cause.ASSIGNED, now)


def unseat(pool: Pool, replica: Replica, node: str | None = None) -> None:
    """The engine of a replica is gone for certain, or will not be on its place: what it took is free.

    `node` is where the replica turned out to be.
    """
    pool.leave_plans(replica)
    pool.book.move(replica, Place(node or replica.place.node, (), replica.model.asleep_shape))
    if replica.is_placed:
        pool.set_placed(replica, False)


def unload(pool: Pool, replica: Replica, cause: Cause, now: float, reason: str = "") -> None:
    """The engine of a replica is to end; where no replica is kept, the replica with it."""
    if not pool.keeps_replicas:
        pool.move(replica, Cause.DISMISSED, now, reason)
        return
    replica.has_engine = False
    replica.order_began = replica.order_due = now
    pool.move(replica, cause, now, reason)


def lose(pool: Pool, replica: Replica, cause: Cause, now: float) -> None:
    """The engine of a replica has failed or died, and is not loaded again in its place."""
    replica.has_engine = False
    replica.order_due = INFINITY
    pool.move(replica, cause, now)
    if pool.keeps_replicas:
        unseat(pool, replica)


def withdraw(pool: Pool, replica: Replica, now: float, reason: str = "withdrawn") -> None:
    """Take back a start or a load. What is not bound to a process yet is gone at once."""
    if replica.uid is None:
        pool.move(replica, Cause.GONE, now, reason)
    else:
        unload(pool, replica, Cause.WITHDRAWN, now, reason)
