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

STARTING, READY, DRAINING = ReplicaState.STARTING, ReplicaState.READY, ReplicaState.DRAINING


def may_go_before(book: Book, other: Replica, replica: Replica) -> bool:
    """Whether Serve may stop `other` before `replica`, which is another of the same model."""
    if replica.uid is None or other.uid is None:
        # Of those that do not run yet one is as good as another.
        return other.uid is None and replica.uid is not None
    here, there = replica.place.node, other.place.node
    if here == there:
        return other.age > replica.age
    return book.node(here).spec.is_head or not book.node(there).spec.is_head


def before(book: Book, replica: Replica) -> list[Replica]:
    """All that must leave with this one, for Serve may stop them, and what may go before them, in its stead."""
    found = [replica]
    if len(replica.model.replicas) > 1:
        for later in found:
            found += [each for each in replica.model.replicas if each not in found and may_go_before(book, each, later)]
    return found[1:]


def is_going(book: Book, replica: Replica) -> bool:
    """It leaves, and so does all that Serve may stop before it."""
    return replica.state >= DRAINING and all(each.state >= DRAINING for each in before(book, replica))


def certain(book: Book, model: Model, more: Iterable[Replica] = ()) -> list[Replica]:
    """Of the replicas that leave and hold no lease, and of `more`, those that Serve is sure to stop; newest first.

    A lower count stops nothing else: whatever may go before one of them was asked for, too, or is among them.
    """
    sure = dict.fromkeys(more)
    for replica in model.replicas:
        if not replica.dismissed and replica.state >= DRAINING and not replica.leases:
            sure[replica] = None
    unsure: list[Replica] | None = None
    while unsure is None or unsure:
        unsure = [each for each in sure if any(b not in sure and not b.dismissed for b in before(book, each))]
        for replica in unsure:
            del sure[replica]
    return [each for each in reversed(model.replicas) if each in sure]


def certain_starts(book: Book, model: Model, wanted: Iterable[Replica]) -> list[Replica]:
    """Those in STARTING among the wanted that can be taken back: Serve stops them, and none that stays."""
    starting = [each for each in wanted if each.state is STARTING]
    return [each for each in certain(book, model, starting) if each.state is STARTING] if starting else []


def first_of(
    book: Book, model: Model, states: tuple[ReplicaState, ...], gone: Iterable[Replica] = ()
) -> Replica | None:
    """The replica in one of these states that Serve is sure to stop before all others in them; None if none is."""
    left = [each for each in reversed(model.replicas) if each.state in states and each not in gone]
    if len(left) < 2:
        return left[0] if left else None
    return next((each for each in left if not any(b in left for b in before(book, each))), None)
