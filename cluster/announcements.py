"""What replicas and ingresses say of themselves to the ledger actor: complete, and again to each new life of it."""

from __future__ import annotations

from typing import NamedTuple

from cluster.config.version import Configuration
from cluster.ledger.events import Grant
from cluster.orders import AsleepState, EngineState


class ReplicaState(NamedTuple):
    """One replica. `started_at` is `time.time()` of its start, so that its age survives a restart of the ledger.

    Its engine is absent, or is being loaded (`loading`: another order to load is not needed), loaded (`engine`), asleep
    (`asleep`), or being ended or put to sleep (`unloading`). `devices` are those of the order to load, as long as
    anything is held on them. `failed` is why its last load failed. `stopping`: Serve has told it to stop, and it only
    lets what runs end. `booked` are the devices that Ray has booked for its process, `host_mib` what that takes of the
    host's memory.
    """

    model: str
    replica: str
    actor_id: str
    node: str
    started_at: float
    engine: EngineState | None = None
    failed: str | None = None
    loading: bool = False
    devices: tuple[int, ...] = ()
    unloading: bool = False
    asleep: AsleepState | None = None
    stopping: bool = False
    booked: tuple[int, ...] = ()
    host_mib: int = 0


class HolderState(NamedTuple):
    """One ingress: the configuration it has, and all the leases it holds and the requests that wait for one.

    What the ledger has in its books for this holder and stands in neither is released. `sent` is the number of the
    holder's last message with arrivals: a state that a later message has overtaken says nothing about those. A guest
    (`is_guest`) is no part of the pool but of another job, which uses it for as long as it is there.
    """

    holder: str
    actor_id: str
    configuration: Configuration
    leases: tuple[Grant, ...] = ()
    waiting: tuple[str, ...] = ()
    sent: int = 0
    is_guest: bool = False
