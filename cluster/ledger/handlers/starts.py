"""Starts that Ray cannot make where they were planned: they are planned anew before anybody waits for them in vain.

Ray chooses the node of a start, and the devices that it books for it. What turns up where another start was planned
may leave no room for that one. Ray would keep it waiting, and its waiters until the end of their patience.
"""

from __future__ import annotations

from cluster.ledger.books.placement import Node
from cluster.ledger.books.pool import Pool
from cluster.ledger.books.records import Replica
from cluster.ledger.books.shapes import named_devices
from cluster.ledger.states import Cause


def replan(pool: Pool, started: Replica, now: float, *, is_new: bool) -> None:
    """Plan anew what was to start where a process has turned up, if that leaves no room for it: here or elsewhere.

    The process itself, if it `is_new` and has no engine, goes before all plans to the devices that Ray has booked: but
    not before one that is bound to them and to no others, as long as it can stand where it was planned. That one has no
    other way, and if it were withdrawn the two might come and go for ever.
    """
    node = pool.book.node(started.place.node)
    crowded = [each for each in node.replicas if each.uid is None and _is_crowded(node, each, started)]
    for replica in crowded:
        pool.book.credit(replica)
    gives_way = any(_has_no_other(node, each, started.place.booked) for each in crowded) and node.is_honest(started)
    if is_new and started.is_placed and not gives_way:
        pool.book.settle_devices(started)
    for replica in crowded:
        shape = replica.place.shape
        place = pool.book.node(node.name).fit(shape, pool.book.hosts(shape))
        replica.place = place or replica.place
        replica.row = None
        pool.book.take(replica)
        if place is None:
            # Serve hears of it only if there is no room for it anywhere: all that changes is what is expected.
            pool.move(replica, Cause.GONE, now, "no_room")


def _has_no_other(node: Node, replica: Replica, booked: tuple[int, ...]) -> bool:
    """A start is bound to devices of this node that are all booked for a process."""
    shape = replica.place.shape
    return bool(shape.only) and len(set(named_devices(node.spec, shape.only)) - set(booked)) < shape.devices


def _is_crowded(node: Node, replica: Replica, started: Replica) -> bool:
    """More is booked where it is to start than there is, by our books or by Ray's, or a process is to stand there."""
    place = replica.place
    if place.shape.cpu and node.cpu < 0:
        return True
    wanted = {each for each in place.devices if each in started.place.booked and each not in started.place.devices}
    taken = any(node.ray.free[each] < 0 for each in place.booked)
    return bool(wanted) or taken or any(node.gpu[each] < 0 for each in place.devices)
