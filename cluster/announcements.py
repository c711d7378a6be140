"""What replicas and ingresses say of themselves to each life of the ledger, complete each time."""

from __future__ import annotations

from typing import NamedTuple

from cluster.ledger.events import Grant
from cluster.ledger.specs import PoolSpec


class ReplicaState(NamedTuple):
    """One replica. `ready` is false while its engine loads; `failed` is why the load failed, if it did."""

    model: str
    replica: str
    actor_id: str
    node: str
    ready: bool
    failed: str | None = None
    memory_mib: int | None = None


class HolderState(NamedTuple):
    """One ingress, the configuration it runs, and the leases it holds, for a ledger that has forgotten them."""

    holder: str
    actor_id: str
    spec: PoolSpec
    leases: tuple[Grant, ...] = ()
