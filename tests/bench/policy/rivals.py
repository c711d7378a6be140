"""The rivals: schedulers in the place of the ledger, each with one simple idea and every advantage that it allows.

Both drain before they swap, batch as many requests as there are slots, keep models warm with the same
least-recently-used rule, and fill free devices at once.
"""

from __future__ import annotations

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
    RequestArrived,
    RequestCancelled,
    SetDesired,
)
from cluster.ledger.specs import PoolSpec


@dataclass
class Place:
    """One device's replica, as the rivals see it."""

    model: str
    uid: str = ""
    state: str = "starting"
    leases: dict[str, float] = field(default_factory=dict)
    used: float = 0.0


class Rival:
    """What both rivals share: devices, leases, least-recently-used eviction with a drain before it."""

    def __init__(self, spec: PoolSpec) -> None:
        self.slots = {name: model.slots for name, model in spec.models.items()}
        self.devices = sum(node.gpus for node in spec.nodes.values())
        self.places: list[Place] = []
        self.line: list[RequestArrived] = []
        self.generation = 0

    def next_deadline(self) -> float | None:
        return None

    def decide(self, event: Event, now: float) -> list[Command]:
        out: list[Command] = []
        if isinstance(event, RequestArrived):
            self.line.append(event)
        elif isinstance(event, RequestCancelled):
            self.line = [each for each in self.line if each.request != event.request]
        elif isinstance(event, LeaseReleased):
            for place in self.places:
                if place.leases.pop(event.request, None) is not None:
                    place.used = now
        elif isinstance(event, ReplicaStarted):
            next(each for each in self.places if each.model == event.model and not each.uid).uid = event.replica
            out.append(LoadEngine(event.replica, event.model, ()))
        elif isinstance(event, ReplicaReady):
            next(each for each in self.places if each.uid == event.replica).state = "ready"
        elif isinstance(event, ReplicaGone):
            self.places = [each for each in self.places if each.uid != event.replica]
        self.settle(out, now)
        for place in self.places:
            if place.state == "draining" and not place.leases:
                place.state = "stopping"
                out.append(SetDesired(place.model, 0))
        return out

    def settle(self, out: list[Command], now: float) -> None:
        raise NotImplementedError

    def place_of(self, model: str) -> Place | None:
        return next((each for each in self.places if each.model == model), None)

    def grant(self, request: RequestArrived, place: Place, out: list[Command], now: float) -> None:
        self.generation += 1
        place.leases[request.request] = now
        place.used = now
        out.append(Grant(request.request, request.holder, request.model, place.uid, (0,), self.generation, 0.0, 0.0))

    def can_grant(self, place: Place | None) -> bool:
        return place is not None and place.state == "ready" and len(place.leases) < self.slots[place.model]

    def start(self, model: str, out: list[Command]) -> bool:
        if len(self.places) >= self.devices:
            return False
        self.places.append(Place(model))
        out.append(SetDesired(model, 1))
        return True

    def leaving(self) -> int:
        return sum(1 for each in self.places if each.state in ("draining", "stopping"))


class Fifo(Rival):
    """Swap on demand, in order of arrival. The head of the line waits for its model; all others wait behind it."""

    def settle(self, out: list[Command], now: float) -> None:
        while self.line:
            head = self.line[0]
            place = self.place_of(head.model)
            if self.can_grant(place):
                assert place is not None
                self.grant(self.line.pop(0), place, out, now)
                continue
            if place is None and not self.start(head.model, out) and not self.leaving():
                ready = [each for each in self.places if each.state == "ready"]
                # Idle ones first, then the one that was used the longest time ago.
                victim = min(ready, key=lambda each: (len(each.leases) > 0, each.used), default=None)
                if victim is not None:
                    victim.state = "draining"
            return


class ReadyFirst(Rival):
    """Whoever's model is loaded goes first; a model that nobody uses or wants makes room for the longest waiting."""

    def settle(self, out: list[Command], now: float) -> None:
        waiting = []
        for request in self.line:
            place = self.place_of(request.model)
            if self.can_grant(place):
                assert place is not None
                self.grant(request, place, out, now)
            else:
                waiting.append(request)
        self.line = waiting
        absent = list(dict.fromkeys(each.model for each in waiting if self.place_of(each.model) is None))
        wanted = {each.model for each in waiting}
        for model in list(absent):
            if self.start(model, out):
                absent.remove(model)
        idle = [each for each in self.places if each.state == "ready" and not each.leases and each.model not in wanted]
        idle.sort(key=lambda each: each.used)
        for victim in idle[: max(0, len(absent) - self.leaving())]:
            victim.state = "draining"
