"""What the ledger actor is told: requests, and what replicas and ingresses say of themselves, complete each time."""

from __future__ import annotations

from typing import NamedTuple

from cluster.ledger.events import Grant
from cluster.ledger.specs import PoolSpec


class Asked(NamedTuple):
    """One request of an ingress for a slot, as it travels to the ledger. `timeout_s` counts from its arrival there."""

    request: str
    holder: str
    model: str
    priority: int
    timeout_s: float
    keep_alive_s: float | None = None


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
