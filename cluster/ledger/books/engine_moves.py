"""The primitive moves of engines in their replicas, on the pool's books: they get a place, load, end. None decides.

Where the pool keeps no replicas without engines, what an engine took stays booked until its replica is gone.
"""

from __future__ import annotations

from cluster.ledger.books.pool import Pool
from cluster.ledger.books.queue import INFINITY
from cluster.ledger.books.records import Replica, learned
from cluster.ledger.books.shapes import Place, asleep_shape
from cluster.ledger.states import Cause, ReplicaState


def seat(pool: Pool, replica: Replica, place: Place, now: float) -> None:
    """Give a replica without an engine, or one that is still to come, an engine's place; one that is here loads.

    An engine that sleeps is woken: the place must be its own devices.
    """
    model = replica.model
    wakes = replica.engine_sleeps
    assert not wakes or place.devices == replica.place.devices, f"{replica} cannot wake on {place}"
    replica.revision = model.revision
    replica.resize(model.spec.slots)
    replica.deaths = 0
    replica.adopted = replica.strayed = replica.ordered = False
    replica.wanted_at = replica.order_began = now
    pool.book.move(replica, place)
    pool.set_placed(replica, True)
    if replica.state is ReplicaState.ASLEEP:
        assign(pool, replica, now)
        replica.wakes = wakes


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
    pool.book.move(replica, pool.asleep_place(node or replica.place.node, replica.host_mib))
    if replica.is_placed:
        pool.set_placed(replica, False)


def unload(pool: Pool, replica: Replica, cause: Cause, now: float, reason: str = "") -> None:
    """The engine of a replica is to end; where no replica is kept, the replica with it."""
    if not pool.keeps_replicas:
        pool.move(replica, Cause.DISMISSED, now, reason)
        return
    replica.has_engine = replica.wakes = False
    replica.order_began = replica.order_due = now
    pool.move(replica, cause, now, reason)


def put_to_sleep(pool: Pool, replica: Replica, host_mib: int, now: float) -> None:
    """The engine of a replica that has drained is to sleep, and will take about so much of the host's memory."""
    unload(pool, replica, Cause.EMPTIED, now)
    replica.falls_asleep = True
    shape = replica.place.shape._replace(host=host_mib)
    pool.book.reseat(replica, replica.place._replace(shape=shape))


def slept(pool: Pool, replica: Replica, host_mib: int, held_mib: int, now: float) -> None:
    """The engine sleeps, and holds so much of the host's memory and of each of its devices."""
    model = replica.model
    model.sleep_s = learned(model.sleep_s, now - replica.order_began)
    replica.falls_asleep = False
    replica.order_due = INFINITY
    pool.move(replica, Cause.SLEPT, now)
    pool.leave_plans(replica)
    pool.set_placed(replica, False)
    lay_down(pool, replica, host_mib, held_mib, replica.place.devices)


def lay_down(pool: Pool, replica: Replica, host_mib: int, held_mib: int, devices: tuple[int, ...]) -> None:
    """Book a replica as one whose engine sleeps on these devices."""
    model = replica.model
    model.asleep_host_mib, model.asleep_device_mib = host_mib, held_mib
    replica.engine_sleeps = True
    model.sleeping += 1
    shape = asleep_shape(replica.host_mib + host_mib, held_mib, len(devices))
    pool.book.node(replica.place.node).widen(max(devices, default=-1) + 1)
    pool.book.reseat(replica, Place(replica.place.node, devices, shape))


def hold_until_ended(pool: Pool, replica: Replica, devices: tuple[int, ...] | None) -> None:
    """There is an engine that nobody has asked for: what it has is nobody else's until it has ended."""
    shape = replica.model.shape
    if devices is not None and len(devices) == shape.devices:
        pool.book.node(replica.place.node).widen(max(devices, default=-1) + 1)
        replica.strayed = True
        pool.book.reseat(replica, Place(replica.place.node, devices, shape))


def demote(pool: Pool, replica: Replica, now: float, reason: str = "") -> None:
    """An engine that sleeps is to end; what it holds stays booked until it has."""
    replica.order_began = replica.order_due = now
    pool.move(replica, Cause.DEMOTED, now, reason)


def give_up_waking(pool: Pool, replica: Replica, now: float) -> None:
    """A waking has failed, or takes too long: what is left of it ends, and then the engine is loaded. Its waiters stay.

    It is not loaded at once, for its failure may be told twice, and would be taken for one of the load.
    """
    model = replica.model
    # As if it had taken that long to wake: a model that cannot is not put to sleep again by choice.
    model.wake_s = learned(model.wake_s, now - replica.order_began + (model.load_s or 0.0))
    unload(pool, replica, Cause.WITHDRAWN, now, "wake")


def lose(pool: Pool, replica: Replica, cause: Cause, now: float) -> None:
    """The engine of a replica has failed or died, and is not loaded again in its place."""
    replica.has_engine = replica.wakes = False
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
