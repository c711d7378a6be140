"""A ledger on a desk: events in, commands out as short words, the invariants checked after each."""

from __future__ import annotations

import logging
from typing import Any

from cluster.ledger.events import (
    Command,
    EndReplica,
    Event,
    Grant,
    LeaseReleased,
    LoadEngine,
    LoadRefused,
    PrefetchModel,
    Quiesce,
    Reject,
    Reopen,
    ReplicaGone,
    ReplicaReady,
    ReplicaStarted,
    RequestArrived,
    RestartEngine,
    SetDesired,
    SleepEngine,
    Ticked,
    UnloadEngine,
    WakeEngine,
)
from cluster.ledger.ledger import Ledger
from cluster.ledger.specs import ModelSpec, NodeSpec, PoolSpec


def model(name: str, **more: Any) -> ModelSpec:
    """A model that takes one whole device."""
    return ModelSpec(name, **{"num_gpus": 1.0, **more})


def word(command: Command) -> str:
    """One command in a few words."""
    match command:
        case Grant():
            return f"grant {command.request} {command.replica}"
        case Reject():
            return f"reject {command.request} {command.error}"
        case SetDesired():
            return f"desire {command.model} {command.replicas}"
        case Quiesce():
            return f"quiesce {command.replica}"
        case Reopen():
            return f"reopen {command.replica}"
        case LoadEngine():
            return f"load {command.replica} {','.join(map(str, command.devices))}"
        case UnloadEngine():
            return f"unload {command.replica}"
        case SleepEngine():
            return f"sleep {command.replica}"
        case WakeEngine():
            return f"wake {command.replica} {','.join(map(str, command.devices))}"
        case PrefetchModel():
            return f"prefetch {command.model} {command.replica}"
        case EndReplica():
            return f"end {command.replica}"
        case RestartEngine():
            return f"restart {command.replica}"
        case LoadRefused():
            return f"refuse {command.model} {command.error}"


class Desk:
    """One ledger and its clock, which moves only when a test says so."""

    def __init__(
        self,
        *models: ModelSpec,
        gpus: int = 1,
        nodes: dict[str, NodeSpec] | None = None,
        recovering_until: float | None = None,
        configured: bool = True,
        **pool: Any,
    ) -> None:
        logging.getLogger("cluster.ledger").setLevel(logging.CRITICAL)
        nodes = {"n": NodeSpec("n", gpus=gpus, cpus=8.0)} if nodes is None else nodes
        self.spec = PoolSpec(models={each.name: each for each in models}, nodes=nodes, **pool)
        self.now = 0.0
        self.out: list[Command] = []
        self.grants: dict[str, Grant] = {}
        # orders to load go with every start, so they are kept here, out of what a test compares
        self.loads: list[LoadEngine] = []
        # and so are those to read a model's files ahead, which go with every claim
        self.prefetches: list[PrefetchModel] = []
        self.ledger = Ledger(self.spec, epoch="e1", now=0.0, recovering_until=recovering_until, configured=configured)

    def tell(self, *events: Event) -> list[str]:
        """Post events at the present time; what they lead to."""
        self.out = []
        for event in events:
            self.out += self.ledger.decide(event, self.now)
            self.ledger.check()
        self.grants |= {each.request: each for each in self.out if isinstance(each, Grant)}
        self.loads += [each for each in self.out if isinstance(each, LoadEngine)]
        self.prefetches += [each for each in self.out if isinstance(each, PrefetchModel)]
        self.out = [each for each in self.out if not isinstance(each, LoadEngine | PrefetchModel)]
        return [word(each) for each in self.out]

    def at(self, now: float) -> list[str]:
        """Let time pass; what it leads to."""
        self.now = now
        return self.tell(Ticked())

    def arrive(
        self,
        request: str,
        name: str,
        priority: int = 2,
        holder: str = "h",
        timeout: float = 600.0,
        keep_alive: float | None = None,
        slots: int = 1,
    ) -> list[str]:
        return self.tell(RequestArrived(request, holder, name, priority, self.now + timeout, keep_alive, slots))

    def release(self, *requests: str) -> list[str]:
        return self.tell(*(LeaseReleased(each, self.grants[each].generation) for each in requests))

    def boot(self, name: str, replica: str, node: str = "n", memory: int | None = None) -> list[str]:
        """A process announces itself and is ready."""
        return self.tell(ReplicaStarted(name, replica, node), ReplicaReady(replica, memory))

    def gone(self, *replicas: str) -> list[str]:
        return self.tell(*(ReplicaGone(each) for each in replicas))

    def warm(self, name: str, replica: str, node: str = "n") -> None:
        """A model is loaded, used once, and idle."""
        request = f"warm-{replica}"
        assert f"desire {name} 1" in self.arrive(request, name)
        assert f"grant {request} {replica}" in self.boot(name, replica, node)
        self.release(request)

    def state(self, replica: str) -> str | None:
        """A replica's state by its id; None if it is not on the books."""
        known = {each.replica: each.state for each in self.ledger.snapshot().replicas}
        return known.get(replica)

    def devices(self, replica: str) -> tuple[int, ...]:
        """The devices that the book has for a replica."""
        return self.ledger._pool.replicas[replica].place.devices

    def out_words(self) -> list[str]:
        """What the last events led to."""
        return [word(each) for each in self.out]

    def extras(self) -> dict[str, Any]:
        """What stands beside the last refusal."""
        last = self.out[-1]
        assert isinstance(last, Reject | LoadRefused)
        return last.extras
