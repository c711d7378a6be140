"""Whether an engine that loses its devices sleeps (level 1) or ends (level 2).

An engine that sleeps comes back sooner, and takes of the host's memory, and some of its devices, meanwhile. All of it
is learned of each model, and assumed before: its time to wake against its time to load, what it holds. Nothing here
changes the state.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.ledger.books import stops
from cluster.ledger.states import ReplicaState

if TYPE_CHECKING:
    from cluster.ledger.books.pool import Pool
    from cluster.ledger.books.records import Model, Replica

ASLEEP, DRAINING = ReplicaState.ASLEEP, ReplicaState.DRAINING

# As in `ModelSpec.sleep_level`.
AUTO, ENDS = 0, 2


def may_sleep(pool: Pool, replica: Replica) -> bool:
    """The engine of a replica that has drained is put to sleep rather than ended."""
    if not replica.has_engine or replica.suspected or not _may_stay(pool, replica):
        return False
    node = pool.book.node(replica.place.node)
    return node.has_host_room(asleep_host_mib(replica)) and _leaves_room(pool, replica)


def unfit(pool: Pool, model: Model) -> list[Replica]:
    """The replicas of a model whose engines sleep and must not any longer."""
    asleep = [each for each in model.in_state(ASLEEP) if each.engine_sleeps]
    return [each for each in asleep if not _may_stay(pool, each)]


def wakes_sooner(model: Model) -> bool:
    """To wake an engine takes less than to load it, as far as that is known."""
    return model.wake_s is None or model.load_s is None or model.wake_s <= model.load_s


def asleep_host_mib(replica: Replica) -> int:
    """What a replica will take of its host's memory when its engine sleeps: as measured, or as much as it is loaded."""
    model = replica.model
    engine_mib = model.shape.memory if model.asleep_host_mib is None else model.asleep_host_mib
    return replica.host_mib + engine_mib


def _may_stay(pool: Pool, replica: Replica) -> bool:
    """Its engine can sleep, is of use when it wakes, and holds little enough of its devices."""
    model = replica.model
    if model.spec.sleep_level == ENDS or not replica.place.devices:
        return False
    if model.removed or model.unloading or stops.is_outdated(pool.book, replica):
        return False
    if (model.asleep_device_mib or 0) > pool.spec.asleep_device_mib:
        return False
    return model.spec.sleep_level != AUTO or _is_sooner(model)


def _is_sooner(model: Model) -> bool:
    """To sleep and wake takes less than to load, as far as that is known."""
    if model.wake_s is None or model.load_s is None:
        return True
    return model.wake_s + (model.sleep_s or 0.0) < model.load_s


def _leaves_room(pool: Pool, replica: Replica) -> bool:
    """What the engine will hold of its devices is not in the way of those for whose sake it must leave them."""
    claim = replica.claim
    if claim is None:
        return True
    node = pool.book.node(replica.place.node)
    here = [each for each in claim.victims if each.place.node == node.name]
    for place in claim.places:
        if place.node != node.name:
            continue
        memory = node.memory + sum(each.place.shape.memory for each in here)
        memory -= sum(_held_mib(pool, each) * len(each.place.devices) for each in here)
        if node.spec.memory_mib and memory < place.shape.memory:
            return False
        for index in place.devices if node.spec.device_memory_mib else ():
            there = [each for each in here if index in each.place.devices]
            free = node.device_memory[index] + sum(each.place.shape.memory_per_device for each in there)
            if free - sum(_held_mib(pool, each) for each in there) < place.shape.memory_per_device:
                return False
    return True


def _held_mib(pool: Pool, victim: Replica) -> int:
    """What a victim will hold of each of its devices: nothing if its engine ends."""
    model = victim.model
    sleeps = victim.falls_asleep or (victim.state is DRAINING and model.spec.sleep_level != ENDS)
    known = model.asleep_device_mib
    return 0 if not sleeps else pool.spec.asleep_device_mib if known is None else known
