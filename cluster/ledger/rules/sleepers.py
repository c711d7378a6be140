"""Replicas without an engine: where a model can load without a new process, how many there may be, and which go.

Only in a pool that keeps replicas when their engines end. An engine is loaded where a replica of its model waits, and a
process is started only where none does. How many processes Serve runs of a model is nothing that a swap changes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from cluster.ledger.books import stops
from cluster.ledger.books.queue import INFINITY
from cluster.ledger.books.records import Model, Replica
from cluster.ledger.states import ReplicaState

if TYPE_CHECKING:
    from cluster.ledger.books.placement import Node
    from cluster.ledger.books.pool import Pool

# What a replica without an engine takes of its host's memory, and which part of that all of them may take together.
ASLEEP_MIB = 200
HOST_SHARE = 0.25

ASLEEP, STARTING, STOPPING = ReplicaState.ASLEEP, ReplicaState.STARTING, ReplicaState.STOPPING


def spare(model: Model) -> Iterator[Replica]:
    """The replicas that can be given an engine: asleep, or still to come and meant for none yet. Oldest first."""
    return (each for each in model.replicas if each.state in (ASLEEP, STARTING) and not each.is_placed)


def most(pool: Pool, model: Model) -> int:
    """How many processes there may be of a model: as many as load at once, and one for each node to load on.

    What drains since it may not serve any longer is not of these.
    """
    draining = model.in_state(ReplicaState.DRAINING) if model.counts[ReplicaState.DRAINING] else ()
    outdated = sum(1 for each in draining if stops.is_outdated(pool.book, each))
    return outdated + max(model.spec.max_replicas, pool.book.present)


def startable(pool: Pool, model: Model) -> int:
    """How many more processes of a model may be started now."""
    # Rule 1 in `states.py`.
    return 0 if model.counts[STOPPING] else max(0, most(pool, model) - len(model.replicas))


def seats(pool: Pool, model: Model) -> int:
    """How many engines of a model could be loaded, now or after the start of a process, if there were room for them."""
    return sum(1 for _ in spare(model)) + startable(pool, model)


def by_node(model: Model) -> Counter[str]:
    """How many replicas that can be given an engine stand on each node."""
    return Counter(each.place.node for each in spare(model))


def usable(pool: Pool, model: Model, nodes: list[Node]) -> list[Node]:
    """The nodes on which an engine of the model could be loaded: where it sleeps, or any if a process may start."""
    if not pool.keeps_replicas or startable(pool, model):
        return nodes
    seats_there = by_node(model)
    return [node for node in nodes if node.name in seats_there]


def seat_on(model: Model, node: str) -> Replica | None:
    """The replica on a node that gets an engine: one that is there before one that is to come. None if none can."""
    here = [each for each in spare(model) if each.place.node == node]
    return min(here, key=lambda each: each.state is STARTING, default=None)


def reader_on(node: Node, model: Model) -> str | None:
    """Whose process on a node can have the files of a model read: one of its own, at best. None if there is no need.

    Not one that has still to fetch another order, which this one would replace.
    """
    here = [each for each in node.replicas if each.uid and not each.suspected]
    if any(each.model is model and each.has_engine for each in here):
        return None
    able = [each for each in here if each.has_engine or (each.state is ASLEEP and not each.is_placed)]
    best = min(able, key=lambda each: (each.model is not model, each.claim is not None, each.serial), default=None)
    return None if best is None else best.uid


def superfluous(pool: Pool, model: Model) -> list[Replica]:
    """The sleepers that their own model has no use for any more."""
    asleep = [each for each in model.in_state(ASLEEP) if not each.is_placed]
    if model.removed:
        return asleep
    lost = [each for each in asleep if not pool.book.node(each.place.node).present or pool.now >= stays_until(each)]
    above = len(model.replicas) - model.counts[STOPPING] - len(lost) - most(pool, model)
    if not above and model.pending_rank is not None:
        lost += _double(pool, model)
    return lost + [each for each in reversed(asleep) if each not in lost][: max(0, above)]


def _double(pool: Pool, model: Model) -> list[Replica]:
    """A sleeper beside another of its model, while a node that the model could load on has none: Ray chose for both.

    It goes for one that is started there, sooner or later; only while the model waits for a place in vain.
    """
    doubles = [each for each in model.in_state(ASLEEP) if not each.is_placed and by_node(model)[each.place.node] > 1]
    if not doubles or model.counts[STOPPING]:
        return []
    covered = {each.place.node for each in model.replicas}
    others = (node for node in pool.book.nodes.values() if node.present and node.name not in covered)
    return doubles[-1:] if any(pool.book.could_stand_on(node, model.shape) for node in others) else []


def stays_until(replica: Replica) -> float:
    """Until when a replica without an engine stays for its model's sake; infinite for as long as there is room."""
    timeout_s = replica.model.spec.sleep_timeout_s
    return replica.since + timeout_s if timeout_s and not _is_wanted(replica.model) else INFINITY


def most_asleep(pool: Pool) -> float:
    """How many replicas without an engine are kept: as configured, or what fits into a part of the hosts' memory."""
    if pool.spec.max_asleep is not None:
        return pool.spec.max_asleep
    host_mib = sum(node.spec.host_memory_mib for node in pool.book.nodes.values())
    return host_mib * HOST_SHARE // ASLEEP_MIB if host_mib else INFINITY


def next_to_go(pool: Pool) -> Replica | None:
    """The least recently used sleeper, if there are too many and Serve is sure to stop it; None otherwise.

    Not one of a model that waits for a place, for it will be needed in a moment.
    """
    if len(pool.asleep) <= most_asleep(pool):
        return None
    unneeded = (each for each in pool.asleep if not _is_wanted(each.model))
    return next((each for each in unneeded if stops.certain(pool.book, each.model, [each])), None)


def _is_wanted(model: Model) -> bool:
    return model.queue.count > 0 or model.order is not None or model.claim is not None
