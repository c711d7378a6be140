"""Which replicas of a model Serve would stop first. The ledger lowers a count only where no stream depends on it.

Serve is told a number and picks by itself (`DeploymentScheduler._get_replicas_to_stop`): what does not run yet, then
what is not on the head node, then on the node with the fewest replicas of all deployments, and there the newest. The
fewest cannot be known here, since other applications count as well; so replicas on different nodes, none of them the
head, are taken to go in any order. Nothing here changes the state.
"""

from __future__ import annotations

from collections.abc import Iterable

from cluster.ledger.books.placement import Book
from cluster.ledger.books.records import Model, Replica
from cluster.ledger.states import ReplicaState

DRAINING, STOPPING = ReplicaState.DRAINING, ReplicaState.STOPPING


def may_go_before(book: Book, other: Replica, replica: Replica) -> bool:
    """Whether Serve may stop `other` before `replica`, which is another of the same model."""
    if other.told_to_stop or replica.told_to_stop:
        # Serve has made its choice, and a lower count makes it choose another.
        return False
    if replica.uid is None or other.uid is None:
        # Of those that do not run yet one is as good as another.
        return other.uid is None and replica.uid is not None
    here, there = replica.place.node, other.place.node
    if here == there:
        return other.age > replica.age
    return book.node(here).spec.is_head or not book.node(there).spec.is_head


def before(book: Book, replica: Replica) -> list[Replica]:
    """All that must leave with this one, for Serve may stop them, and what may go before them, in its stead."""
    known = replica.model.before
    if replica not in known:
        known[replica] = find_before(book, replica)
    return known[replica]


def find_before(book: Book, replica: Replica) -> list[Replica]:
    """The same, found anew."""
    if len(replica.model.replicas) == 1 or replica.uid is None:
        return []
    here = replica.place.node
    is_head = book.node(here).spec.is_head
    found: list[Replica] = []
    rest: list[Replica] = []
    any_order = False
    for each in replica.model.replicas:
        if each is replica:
            continue
        if not may_go_before(book, each, replica):
            rest.append(each)
            continue
        found.append(each)
        there = each.place.node
        any_order = any_order or (there != here and each.uid is not None and book.node(there).spec.is_head == is_head)
    # One on another node of the kind may go before this one, and the older ones here before that one.
    older = [each for each in rest if each.place.node == here and not each.told_to_stop] if any_order else []
    return found + older


def with_it(book: Book, replica: Replica) -> list[Replica]:
    """All that must leave for the engine of this one to end: none where that is not Serve's business."""
    return [] if book.keeps_replicas else before(book, replica)


def is_going(book: Book, replica: Replica) -> bool:
    """Its engine leaves, and so does all that Serve may stop before it."""
    if not replica.is_placed:
        # An engine that slept holds something until it has ended.
        return replica.state in (ReplicaState.UNLOADING, STOPPING) and bool(replica.place.devices)
    if not replica.state.is_going:
        return False
    return all(each.state.is_going for each in with_it(book, replica))


def certain(book: Book, model: Model, more: Iterable[Replica] = ()) -> list[Replica]:
    """Of the replicas that leave and hold no lease, and of `more`, those that Serve is sure to stop; newest first.

    Where replicas stay when their engine ends, only of `more`.

    A lower count stops nothing else: whatever may go before one of them was asked for, too, or is among them.
    """
    sure = dict.fromkeys(more)
    for replica in model.replicas if not book.keeps_replicas else ():
        if DRAINING <= replica.state < STOPPING and not replica.leases:
            sure[replica] = None
    unsure: list[Replica] | None = None
    while unsure is None or unsure:
        unsure = [each for each in sure if any(b not in sure and b.state is not STOPPING for b in before(book, each))]
        for replica in unsure:
            del sure[replica]
    return [each for each in reversed(model.replicas) if each in sure]


def is_outdated(book: Book, replica: Replica) -> bool:
    """It may not serve any longer, whoever waits.

    Its model's configuration has changed, its node is gone, or Serve has told it to stop.
    """
    if replica.told_to_stop or replica.revision != replica.model.revision:
        return True
    return not book.nodes[replica.place.node].present


def certain_starts(book: Book, model: Model, wanted: Iterable[Replica]) -> list[Replica]:
    """Those of the wanted that do not serve yet and can be taken back: Serve stops them, and none that stays.

    Where replicas stay, a load is taken back without Serve, and of processes that do not run yet one is like another.
    """
    rising = [each for each in wanted if each.is_rising]
    if book.keeps_replicas:
        return rising
    return [each for each in certain(book, model, rising) if each.is_rising] if rising else []


def first_of(
    book: Book, model: Model, states: tuple[ReplicaState, ...], gone: Iterable[Replica] = ()
) -> Replica | None:
    """The replica in one of these states that Serve is sure to stop before all others in them; None if none is."""
    left = [each for each in reversed(model.replicas) if each.state in states and each.is_placed and each not in gone]
    if len(left) < 2 or book.keeps_replicas:
        return left[0] if left else None
    return next((each for each in left if not any(b in left for b in before(book, each))), None)
