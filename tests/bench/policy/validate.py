"""Is this a schedule at all? A judge of what happened in a simulated cluster, who knows no scheduler and no search.

He reads the log of events and commands, and the trace. One device holds one model at a time, from the start of its
process until that is gone; a load takes its time; nobody is served by what is not loaded or has been told to stop,
beyond the slots, or cut off; and in the end everybody was served, for as long as he needed.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from cluster.ledger.events import (
    Command,
    Event,
    Grant,
    LeaseReleased,
    LoadEngine,
    ReplicaGone,
    ReplicaReady,
    ReplicaStarted,
    SetDesired,
)
from tests.bench.policy.traces import Trace
from tests.sim.world import Process, World

EPSILON_S = 1e-6


class Recorder(World):
    """A world that writes down all that was said, and when."""

    log: list[tuple[float, Event | Command]]

    def tell(self, event: Event, of: Process | None = None) -> None:
        self._write(event)
        super().tell(event, of)

    def _obey(self, command: Command) -> None:
        self._write(command)
        super()._obey(command)

    def _write(self, said: Event | Command) -> None:
        self.__dict__.setdefault("log", []).append((self.now, said))


@dataclass
class Seen:
    """A replica as the log tells of it."""

    model: str
    order_at: float | None = None
    ready: bool = False
    leases: dict[str, float] = field(default_factory=dict)


def faults(trace: Trace, log: list[tuple[float, Event | Command]]) -> list[str]:
    """What is wrong with a schedule, in words; empty if it can be carried out."""
    found: list[str] = []
    alive: dict[str, Seen] = {}
    desired: Counter[str] = Counter()
    served: list[tuple[str, float]] = []
    for now, said in log:
        if isinstance(said, SetDesired):
            desired[said.model] = said.replicas
            busy = [uid for uid, each in alive.items() if each.model == said.model and each.leases]
            if len(busy) > said.replicas:
                found.append(f"{now:.3f}: {said.model} is to stop, and {busy[0]} serves somebody")
        elif isinstance(said, ReplicaStarted):
            alive[said.replica] = Seen(said.model)
            if len(alive) > trace.gpus:
                found.append(f"{now:.3f}: {len(alive)} replicas on {trace.gpus} devices")
        elif isinstance(said, LoadEngine):
            alive[said.replica].order_at = now
        elif isinstance(said, ReplicaReady):
            seen = alive[said.replica]
            if seen.order_at is None or now < seen.order_at + trace.load_s[seen.model] - EPSILON_S:
                found.append(f"{now:.3f}: {said.replica} is ready before it can be loaded")
            seen.ready = True
        elif isinstance(said, ReplicaGone):
            if alive.pop(said.replica).leases:
                found.append(f"{now:.3f}: {said.replica} is gone, and served somebody")
        elif isinstance(said, Grant):
            seen = alive.get(said.replica, Seen(said.model))
            if not seen.ready or not desired[seen.model] or seen.model != said.model:
                found.append(f"{now:.3f}: {said.request} is granted to {said.replica}, which does not serve it")
            seen.leases[said.request] = now
            if len(seen.leases) > trace.slots:
                found.append(f"{now:.3f}: {said.replica} serves {len(seen.leases)} with {trace.slots} slots")
        elif isinstance(said, LeaseReleased):
            for seen in alive.values():
                if said.request in seen.leases:
                    served.append((seen.model, now - seen.leases.pop(said.request)))
    asked = sorted((model, service_s) for model, _, service_s in trace.asked)
    served.sort()
    exact = len(served) == len(asked) and all(
        has[0] == wants[0] and abs(has[1] - wants[1]) < EPSILON_S for has, wants in zip(served, asked, strict=True)
    )
    return found if exact else [*found, f"{len(asked)} asked, and {len(served)} were served, not all as long"]
