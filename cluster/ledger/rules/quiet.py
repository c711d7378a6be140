"""Which model's process to start though nobody waits for it, so that its first load needs no new one.

Only where replicas stay without their engines, as many as may, and while somebody is there who could ask for a model.
One process starts at a time, after a while without a request and without anything that starts, loads, ends or streams:
its imports take a second or more of a core. Nothing here changes the state.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.ledger.books.servers import is_remote
from cluster.ledger.states import ReplicaState

if TYPE_CHECKING:
    from cluster.ledger.books.placement import Node
    from cluster.ledger.books.pool import Pool
    from cluster.ledger.books.records import Model

MOVING = (
    ReplicaState.STARTING,
    ReplicaState.LOADING,
    ReplicaState.DRAINING,
    ReplicaState.UNLOADING,
    ReplicaState.STOPPING,
)


def is_quiet(pool: Pool) -> bool:
    """Nobody waits, nothing streams, and no replica is on its way from one state to another."""
    if pool.waiters or pool.leases or not pool.holders:
        return False
    return not any(model.counts[state] for model in pool.models.values() for state in MOVING)


def next_start(pool: Pool, now: float) -> tuple[Model, Node] | None:
    """The model whose process is started next, the last used first, and a node with room for it; None if none is."""
    if pool.spec.max_asleep is not None and len(pool.asleep) >= pool.spec.max_asleep:
        return None
    nodes = [
        each for each in pool.book.nodes.values() if each.present and each.has_host_room(each.host + pool.asleep_mib)
    ]
    wanted = [model for model in pool.models.values() if _lacks_process(pool, model, now)]
    if not (nodes and wanted):
        return None
    return max(wanted, key=lambda model: model.last_arrival), min(nodes, key=lambda node: node.host)


def _lacks_process(pool: Pool, model: Model, now: float) -> bool:
    if model.replicas or model.removed or model.held_down or is_remote(model) or now < model.quiet_from:
        return False
    return not model.failures and pool.book.could_ever_fit(model.shape)
