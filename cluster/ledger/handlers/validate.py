"""Events come from outside: what is not well-formed is found here, before anything is touched."""

from __future__ import annotations

from math import isfinite
from typing import Any

from cluster.ledger import events
from cluster.ledger.specs import NodeSpec, PoolSpec

_TEXT, _NUMBER, _COUNT = (str,), (int, float), (int,)

_FIELDS: dict[type[Any], tuple[tuple[type[Any], ...], ...]] = {
    events.RequestArrived: (_TEXT, _TEXT, _TEXT, _COUNT, _NUMBER, (int, float, type(None)), _COUNT, _TEXT, (bool,)),
    events.RequestCancelled: (_TEXT,),
    events.LeaseReleased: (_TEXT, _COUNT),
    events.HolderDied: (_TEXT,),
    events.HolderAnnounced: (_TEXT, (tuple,), (tuple,)),
    events.ReplicaStarted: (
        *(_TEXT, _TEXT, _TEXT, _NUMBER, (bool,), (tuple,), (bool,), (bool,), (tuple,)),
        *(_COUNT, (tuple, type(None))),
    ),
    events.ReplicaReady: (_TEXT, (int, type(None)), (object,), (tuple, type(None)), _COUNT, (str, type(None))),
    events.ReplicaFailed: (_TEXT, _TEXT),
    events.EngineDied: (_TEXT, _TEXT),
    events.EngineUnloaded: (_TEXT,),
    events.EngineAsleep: (_TEXT, _COUNT, _COUNT),
    events.ReplicaSuspected: (_TEXT,),
    events.ReplicaStopping: (_TEXT,),
    events.ReplicaGone: (_TEXT,),
    events.NodesChanged: ((dict,),),
    events.ConfigChanged: ((PoolSpec,),),
    events.LoadRequested: (_TEXT, _COUNT),
    events.UnloadRequested: (_TEXT,),
    events.LeaseReannounced: (_TEXT, _TEXT, _TEXT, _TEXT, _COUNT, _COUNT, _COUNT),
    events.ServerManifest: (_TEXT, (tuple, type(None)), (str, type(None))),
    events.ServerSuspected: (_TEXT,),
    events.Ticked: (),
}


# A node has no more devices than this, whatever a message says.
MAX_DEVICES = 1024
# Nor has a replica more slots: each of them has an entry in the books.
MAX_SLOTS = 65536


def fault(event: Any) -> str | None:
    """What is wrong with an event; None if it is well-formed. Legal in form is not yet legal in the ledger's state."""
    # The two kinds that come by the thousand are looked at by hand.
    kind = type(event)
    if kind is events.LeaseReleased:
        if type(event.request) is str and type(event.generation) is int:
            return None
    elif (
        kind is events.RequestArrived
        and type(event.request) is type(event.holder) is type(event.model) is str
        and type(event.priority) is int
        and 1 <= event.priority <= 3
        and type(event.deadline) is float
        and event.keep_alive_s is None
        and type(event.slots) is int
        and event.slots >= 1
        and type(event.principal) is str
        and type(event.is_patient) is bool
        and isfinite(event.deadline)
    ):
        return None
    return _fault(event)


def _fault(event: Any) -> str | None:
    fields = _FIELDS.get(type(event))
    if fields is None:
        return "not an event"
    for value, types, name in zip(event, fields, event._fields, strict=True):
        if not isinstance(value, types):
            return f"{name} is {value!r}"
    if type(event) in (events.RequestArrived, events.LeaseReannounced) and event.priority not in (1, 2, 3):
        return f"priority is {event.priority!r}"
    if type(event) in (events.RequestArrived, events.LeaseReannounced) and event.slots < 1:
        return f"slots is {event.slots!r}"
    if type(event) is events.RequestArrived:
        if not isfinite(event.deadline):
            return f"deadline is {event.deadline!r}"
        if event.keep_alive_s is not None and event.keep_alive_s != event.keep_alive_s:
            return "keep_alive_s is not a number"
    if type(event) is events.NodesChanged:
        for name, spec in event.nodes.items():
            if not isinstance(name, str) or not isinstance(spec, NodeSpec):
                return f"node {name!r} is {spec!r}"
    if type(event) is events.ServerManifest and not all(isinstance(name, str) for name in event.models or ()):
        return f"models is {event.models!r}"
    if type(event) is events.HolderAnnounced:
        return _holder_fault(event)
    if type(event) is events.ReplicaStarted and not isfinite(event.started_at):
        return f"started_at is {event.started_at!r}"
    if type(event) is events.ReplicaStarted and not all(
        type(each) is int and 0 <= each < MAX_DEVICES for each in (*event.devices, *event.booked)
    ):
        return f"devices is {event.devices!r}, booked is {event.booked!r}"
    if type(event) is events.ReplicaStarted and not _is_weight(event):
        return f"what it holds is {event.host_mib!r} and {event.asleep_mib!r}"
    if type(event) is events.ReplicaReady:
        if event.memory_mib is not None and event.memory_mib < 0:
            return f"memory_mib is {event.memory_mib!r}"
        if not all(isinstance(device, str) for device in event.devices or ()):
            return f"devices is {event.devices!r}"
        if not 0 <= event.slots <= MAX_SLOTS:
            return f"slots is {event.slots!r}"
    if type(event) is events.EngineAsleep and min(event.host_mib, event.device_mib) < 0:
        return f"what it holds is {event.host_mib!r} and {event.device_mib!r}"
    return None


def _is_weight(event: events.ReplicaStarted) -> bool:
    """What a process says that it holds could be true."""
    held = event.asleep_mib
    if held is not None and not (len(held) == 2 and all(type(each) is int and each >= 0 for each in held)):
        return False
    return event.host_mib >= 0


def _holder_fault(event: events.HolderAnnounced) -> str | None:
    pairs = (isinstance(each, tuple) and len(each) == 2 for each in event.leases)
    if not all(pairs) or not all(isinstance(name, str) and isinstance(number, int) for name, number in event.leases):
        return f"leases is {event.leases!r}"
    if not all(isinstance(name, str) for name in event.waiting):
        return f"waiting is {event.waiting!r}"
    return None
