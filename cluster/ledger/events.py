"""What happens to the ledger (events, past tense) and what it wants done (commands, imperative).

Both are plain immutable tuples: cheap to make, easy to compare in a test, and picklable. `request` ids are made by
the client of the ledger, so that a repeated arrival is recognised; the same id names the lease once it is granted.
`replica` is the id of a running replica process as it announced itself, or the URL of an external server. Times are
seconds on the caller's clock.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from cluster.ledger.specs import NodeSpec, PoolSpec

# --- events -------------------------------------------------------------------------------------------------------


class RequestArrived(NamedTuple):
    """A request wants a slot of `model`. `priority` 1 is high, 2 medium, 3 low; `deadline` is absolute.

    `keep_alive_s` is how long the model should stay after this request: None = the model's idle timeout, -1 = pin.
    `slots` is how many sequences it will run at once: it gets so many slots of one replica, or all that a replica has.
    `principal` is who asks: the name of an API key. One that `is_patient` is let into a full queue.
    """

    request: str
    holder: str
    model: str
    priority: int
    deadline: float
    keep_alive_s: float | None = None
    slots: int = 1
    principal: str = "anonymous"
    is_patient: bool = False


class RequestCancelled(NamedTuple):
    """The client of a request left; legal whether it still waits or already holds a lease."""

    request: str


class LeaseReleased(NamedTuple):
    """The holder gives a lease back. `generation` is the grant's own number: a stale release changes nothing."""

    request: str
    generation: int


class HolderDied(NamedTuple):
    """An ingress (or any other holder of leases) is confirmed dead: all that it waited for or held is gone."""

    holder: str


class HolderAnnounced(NamedTuple):
    """All that a holder holds, as (request, generation), and all that it has asked for and not settled.

    What the ledger has for it beyond that was given up by a message that was lost, and ends now.
    """

    holder: str
    leases: tuple[tuple[str, int], ...]
    waiting: tuple[str, ...]


class ReplicaStarted(NamedTuple):
    """A replica process of `model` exists. `started_at` (any clock, the same for all) orders the replicas of a model.

    `loading`: its engine is loaded, is being loaded or has failed already, so no `LoadEngine` is wanted; `unloading`:
    it is being ended. `devices` are those that a former life of the ledger ordered for it. `stopping`: Serve has told
    it to stop, as in `ReplicaStopping`. `booked` are those that Ray has booked for it; none if that is not known.
    `host_mib` is what the process itself takes of its host's memory (0 = not measured); where its engine sleeps,
    `asleep_mib` is what that holds beside it of the host's memory, and of each of its devices.
    """

    model: str
    replica: str
    node: str
    started_at: float = 0.0
    loading: bool = False
    devices: tuple[int, ...] = ()
    unloading: bool = False
    stopping: bool = False
    booked: tuple[int, ...] = ()
    host_mib: int = 0
    asleep_mib: tuple[int, int] | None = None


class ReplicaStopping(NamedTuple):
    """Serve has told a replica to stop: what runs on it may end, and then it goes, whatever anybody wants."""

    replica: str


class ReplicaReady(NamedTuple):
    """The engine of a replica serves. `memory_mib` is what it was seen to take (None = not measured).

    `address` is where it listens; the ledger only passes it on. `devices` are those that its process really has.
    `slots` and `revision` are those of the order to load (0 and None = not told): a new life of the ledger cannot know
    by which configuration an engine was loaded.
    """

    replica: str
    memory_mib: int | None = None
    address: Any = None
    devices: tuple[str, ...] | None = None
    slots: int = 0
    revision: str | None = None


class ReplicaFailed(NamedTuple):
    """The engine of a replica could not be loaded; the process is still there and holds nothing of use."""

    replica: str
    reason: str


class EngineDied(NamedTuple):
    """The engine of a replica is confirmed dead, with all that it did; the replica itself lives and can load again."""

    replica: str
    reason: str


class EngineUnloaded(NamedTuple):
    """An engine has ended as ordered, and its devices are free; its replica lives and can load again."""

    replica: str


class EngineAsleep(NamedTuple):
    """An engine sleeps: it still holds `host_mib` of its host's memory and `device_mib` of each of its devices."""

    replica: str
    host_mib: int
    device_mib: int


class ReplicaSuspected(NamedTuple):
    """A holder of a lease saw that a replica's engine hangs."""

    replica: str


class ReplicaGone(NamedTuple):
    """The process of a replica is confirmed dead; only now are its resources free again."""

    replica: str


class NodesChanged(NamedTuple):
    """The cluster's machines, complete."""

    nodes: dict[str, NodeSpec]


class ConfigChanged(NamedTuple):
    """The pool's configuration, complete, except for the nodes, which are kept."""

    spec: PoolSpec


class LoadRequested(NamedTuple):
    """An operator wants `replicas` replicas of a model loaded, all or nothing; it overrides `manual`."""

    model: str
    replicas: int


class UnloadRequested(NamedTuple):
    """An operator wants a model gone: the queued are rejected, the running finish, then it is unloaded."""

    model: str


class LeaseReannounced(NamedTuple):
    """After a restart of the ledger: a holder still streams on a lease of the epoch before. No grant is sent for it.

    It may come before or after its replica announced itself.
    """

    request: str
    holder: str
    model: str
    replica: str
    generation: int
    priority: int = 2
    slots: int = 1


class ServerManifest(NamedTuple):
    """What an external server offers, complete, or None when it cannot be read: it serves nothing until it can."""

    server: str
    models: tuple[str, ...] | None
    error: str | None = None


class ServerSuspected(NamedTuple):
    """A request lost its external server: it gets no new one until its next `ServerManifest`, for which all wait."""

    server: str


class Ticked(NamedTuple):
    """Time passed; the caller sends it when `Ledger.next_deadline()` has come."""


# --- commands -----------------------------------------------------------------------------------------------------


class Grant(NamedTuple):
    """Slots are leased to `request`. `load_wait_s` is the part of `queue_wait_s + load_wait_s` spent on a load.

    `address` is what the replica's `ReplicaReady` said, `devices` those of its node that it was assigned.
    """

    request: str
    holder: str
    model: str
    replica: str
    slots: tuple[int, ...]
    generation: int
    queue_wait_s: float
    load_wait_s: float
    address: Any = None
    devices: tuple[int, ...] = ()


class Reject(NamedTuple):
    """A request is refused. `error` names a class of `cluster.errors`; `extras` go into the error's body."""

    request: str
    holder: str
    error: str
    message: str
    extras: dict[str, Any]


class SetDesired(NamedTuple):
    """The number of replicas of a model that should exist from now on; absolute, not a difference."""

    model: str
    replicas: int


class Quiesce(NamedTuple):
    """A replica drains: it gets no new lease, and stops after its last one. Lowering comes as `SetDesired` later.

    For those who watch, like `Reopen`: what runs on it goes on, so there is nothing that the replica would have to do.
    """

    replica: str


class Reopen(NamedTuple):
    """A draining replica is open again; only possible before it is stopping."""

    replica: str


class LoadEngine(NamedTuple):
    """A replica shall load its engine on these devices of its node."""

    replica: str
    model: str
    devices: tuple[int, ...]


class UnloadEngine(NamedTuple):
    """A replica without leases shall end its engine, and stay; `EngineUnloaded` then says that it did."""

    model: str
    replica: str


class SleepEngine(NamedTuple):
    """A replica without leases shall put its engine to sleep; `EngineAsleep` or `EngineUnloaded` then says so."""

    model: str
    replica: str


class WakeEngine(NamedTuple):
    """A replica shall wake its engine, on the devices that this has; answered like a `LoadEngine`."""

    model: str
    replica: str
    devices: tuple[int, ...]


class PrefetchModel(NamedTuple):
    """A replica without an engine shall have the files of its model read, since it will load them soon."""

    model: str
    replica: str


class EndReplica(NamedTuple):
    """A replica does not do what it was ordered: its process shall be ended. `ReplicaGone` then says that it is."""

    replica: str


class RestartEngine(NamedTuple):
    """A replica shall kill its engine, which hangs; `EngineDied` then says that it is dead."""

    replica: str


class LoadRefused(NamedTuple):
    """A `LoadRequested` changed nothing: not all of its replicas can be placed. Fields as in `Reject`."""

    model: str
    error: str
    message: str
    extras: dict[str, Any]


Event = (
    RequestArrived
    | RequestCancelled
    | LeaseReleased
    | HolderDied
    | HolderAnnounced
    | ReplicaStarted
    | ReplicaReady
    | ReplicaFailed
    | EngineDied
    | EngineUnloaded
    | EngineAsleep
    | ReplicaSuspected
    | ReplicaStopping
    | ReplicaGone
    | NodesChanged
    | ConfigChanged
    | LoadRequested
    | UnloadRequested
    | LeaseReannounced
    | ServerManifest
    | ServerSuspected
    | Ticked
)
Command = (
    Grant
    | Reject
    | SetDesired
    | Quiesce
    | Reopen
    | LoadEngine
    | UnloadEngine
    | SleepEngine
    | WakeEngine
    | PrefetchModel
    | RestartEngine
    | EndReplica
    | LoadRefused
)
