"""Replicas without a loaded engine: where a model can load without a new process, how many may stay, and which go.

Only in a pool that keeps replicas when their engines end. An engine is loaded where a replica of its model waits, and a
process is started only where none does. How many processes Serve runs of a model is nothing that a swap changes.

An engine that can sleep (level 1) stays in its process with its weights in the host's memory, where that has room and
where it has proved to come back sooner than by a load; `levels.py` judges that.
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
    from cluster.ledger.books.shapes import Place

ASLEEP, STARTING, STOPPING = ReplicaState.ASLEEP, ReplicaState.STARTING, ReplicaState.STOPPING
UNLOADING = ReplicaState.UNLOADING


def spare(model: Model) -> Iterator[Replica]:
    """The replicas that can load an engine: without one, or still to come and meant for none yet. Oldest first."""
    return (each for each in to_be_spare(model) if each.state is not UNLOADING and not each.engine_sleeps)


def to_be_spare(model: Model) -> Iterator[Replica]:
    """Those, and the ones that can once the engine that sleeps in them has ended."""
    able = (each for each in model.replicas if not (each.is_placed or each.told_to_stop))
    return (each for each in able if each.state in (ASLEEP, STARTING, UNLOADING))


def most(pool: Pool, model: Model) -> int:
    """How many processes there may be of a model: as many as load at once, and one for each node to load on.

    What drains since it may not serve any longer is not of these while streams run on it: without any it is free for
    another engine in a moment.
    """
    draining = model.in_state(ReplicaState.DRAINING) if model.counts[ReplicaState.DRAINING] else ()
    outdated = sum(1 for each in draining if each.leases and stops.is_outdated(pool.book, each))
    return outdated + max(model.spec.max_replicas, pool.book.present)


def startable(pool: Pool, model: Model) -> int:
    """How many more processes of a model may be started now."""
    # Rule 1 in `states.py`.
    return 0 if model.counts[STOPPING] else max(0, most(pool, model) - len(model.replicas))


def seats(pool: Pool, model: Model) -> int:
    """How many engines of a model could be loaded, now or after the start of a process, if there were room for them."""
    return sum(1 for _ in to_be_spare(model)) + startable(pool, model)


def by_node(model: Model) -> Counter[str]:
    """How many replicas that can be given an engine stand on each node."""
    return Counter(each.place.node for each in spare(model))


def usable(pool: Pool, model: Model, nodes: list[Node]) -> list[Node]:
    """The nodes on which an engine of the model could be loaded: where it sleeps, or any if a process may start."""
    if not pool.keeps_replicas or startable(pool, model):
        return nodes
    seats_there = {each.place.node for each in to_be_spare(model)}
    return [node for node in nodes if node.name in seats_there]


def sleepers_on(model: Model, node: Node) -> list[Replica]:
    """The replicas of a model on a node whose engines sleep."""
    return [each for each in model.in_state(ASLEEP) if each.engine_sleeps and each.place.node == node.name]


def in_the_way(pool: Pool, model: Model, node: Node) -> Replica | None:
    """The one whose sleeping engine must end so that the model can load on a node; None if a replica is free for it."""
    if startable(pool, model) or by_node(model)[node.name]:
        return None
    return next(iter(sleepers_on(model, node)), None)


def can_wake(pool: Pool, model: Model, but: list[Place]) -> Place | None:
    """Where one of the model's sleeping engines has room to wake now; not at any of those places."""
    hosts = pool.book.hosts(model.shape)
    asleep = [each for each in model.in_state(ASLEEP) if each.engine_sleeps]
    found = (pool.book.node(each.place.node).fit_awake(each, model.shape, hosts) for each in asleep)
    return next((place for place in found if place is not None and place not in but), None)


def sleeper_at(model: Model, place: Place) -> Replica | None:
    """The replica whose engine sleeps on just these devices."""
    if not model.sleeping:
        return None
    there = (each for each in model.in_state(ASLEEP) if each.engine_sleeps)
    return next((each for each in there if each.place[:2] == place[:2]), None)


def seat_for(model: Model, place: Place) -> Replica | None:
    """The replica that gets an engine on a place: one that has only to wake it, or any that waits on that node."""
    return sleeper_at(model, place) or seat_on(model, place.node)


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
    return replica.rested_at + timeout_s if timeout_s and not is_wanted(replica.model) else INFINITY


def next_to_go(pool: Pool) -> tuple[list[Replica], bool] | None:
    """The least recently used sleeper, with those that must go with it, if there are too many or their host has no room
    for them, and whether all of it goes or only the engine that sleeps in it.

    For want of room such an engine goes before any replica does. A replica only goes where Serve is sure to stop it.
    Not one of a model that waits for a place, for it will be needed in a moment.
    """
    many = pool.spec.max_asleep is not None and len(pool.asleep) > pool.spec.max_asleep
    crowded = [node for node in pool.book.nodes.values() if not node.has_host_room(node.host)]
    if not (many or crowded):
        return None
    unneeded = [each for each in pool.asleep if not is_wanted(each.model)]
    if many and (first := _first_certain(pool, unneeded)):
        return first, True
    full = {node.name for node in crowded if not node.has_host_room(_host_mib(node, True))}
    engines = (each for each in unneeded if each.engine_sleeps and each.place.node in full)
    if (engine := next(engines, None)) is not None:
        return [engine], False
    # What falls asleep comes in the place of one that wakes, as a rule, and what starts will load: none goes for that.
    full = {node.name for node in crowded if not node.has_host_room(_host_mib(node, False))}
    first = _first_certain(pool, [each for each in unneeded if each.place.node in full])
    return (first, True) if first else None


def _first_certain(pool: Pool, replicas: list[Replica]) -> list[Replica]:
    """The first that Serve is sure to stop before all others of its model; none if it may stop others in its stead.

    Where that is so of each, as on nodes that are not the head: the first with all of those others, if they sleep, too.
    """
    for each in replicas:
        if stops.certain(pool.book, each.model, [each]):
            return [each]
    for each in replicas:
        together = [each, *(other for other in stops.before(pool.book, each) if other.state is not STOPPING)]
        if all(other in pool.asleep and not other.is_placed for other in together):
            return together
    return []


def _host_mib(node: Node, to_come: bool) -> int:
    """What sleepers will hold of a host's memory when all that ends has ended; with what is to come, or without."""
    ending = [each for each in node.replicas if not each.is_placed and each.state in (UNLOADING, STOPPING)]
    host_mib = node.host - sum(each.place.shape.host for each in ending)
    host_mib += sum(each.host_mib for each in ending if each.state is UNLOADING)
    if to_come:
        return host_mib
    host_mib -= sum(each.place.shape.host for each in node.replicas if each.state is STARTING)
    return host_mib - sum(each.place.shape.host - each.host_mib for each in node.replicas if each.falls_asleep)


def is_wanted(model: Model) -> bool:
    """Somebody waits for it."""
    return model.queue.count > 0 or model.order is not None or model.claim is not None
