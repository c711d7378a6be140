"""Large pools in motion: events of every kind, each timed by itself, for `bench_ledger.py`.

A storm is a ledger at 1,000 models, 10,000 replicas and 100,000 requests in line, with an outside that obeys: processes
start and end as they are told, engines load and unload, streams last for some seconds, and clients keep the lines as
long as they are. On top of that, much more often than in life, everything else happens: clients leave, many deadlines
come at one moment, replicas and engines die, machines are lost and come back, the configuration changes, operators load
and unload, holders announce all that they have, and people look at snapshots.

Rare events are drawn a hundred times more often than life does. The clock is virtual. What is timed is `decide` and
`next_deadline`, as the ledger's actor calls them for every event.
"""

from __future__ import annotations

import gc
import heapq
import itertools
import random
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from cluster.ledger.events import (
    ConfigChanged,
    EndReplica,
    EngineDied,
    EngineUnloaded,
    Event,
    Grant,
    HolderAnnounced,
    HolderDied,
    LeaseReleased,
    LoadEngine,
    LoadRequested,
    NodesChanged,
    Reject,
    ReplicaFailed,
    ReplicaGone,
    ReplicaReady,
    ReplicaStarted,
    ReplicaSuspected,
    RequestArrived,
    RequestCancelled,
    RestartEngine,
    Ticked,
    UnloadEngine,
    UnloadRequested,
)
from cluster.ledger.ledger import Ledger
from cluster.ledger.specs import ModelSpec, NodeSpec, PoolSpec
from cluster.ledger.states import ReplicaState
from cluster.ledger.transitions import Moved

clock = time.perf_counter
MODELS, REPLICAS, QUEUED = 1_000, 10_000, 100_000
SLOTS = 4
LOAD_S, UNLOAD_S, START_S = 3.0, 0.1, 0.5
HOLDERS = 8
#: What is no event: what people and metrics look at.
VIEWS = ("snapshot", "briefs")
#: So many ordinary events come for one of the others.
EVERY = 40


def wide(models: int, replicas: int) -> PoolSpec:
    """Many small machines with whole devices; replicas stay when their engines go."""
    return _spec(models, replicas, nodes=max(1, replicas // 8), gpus=8, num_gpus=1.0, max_asleep=None)


def crowded(models: int, replicas: int) -> PoolSpec:
    """Few machines with fractions of devices, a thousand replicas on each; a replica ends with its engine."""
    nodes = max(1, replicas // 1000)
    return _spec(models, replicas, nodes=nodes, gpus=replicas // nodes // 8, num_gpus=0.125, max_asleep=0)


def capped(models: int, replicas: int) -> PoolSpec:
    """Sixteen machines, and a number of resident models that two thirds of all models reach."""
    spec = _spec(models, replicas, nodes=16, gpus=max(1, replicas // 16 // 8 + 1), num_gpus=0.125, max_asleep=0)
    return replace(spec, capacity=models * 2 // 3)


def _spec(models: int, replicas: int, *, nodes: int, gpus: int, num_gpus: float, max_asleep: int | None) -> PoolSpec:
    most = max(2, replicas * 3 // models // 2)
    return PoolSpec(
        models={
            name: ModelSpec(name, slots=SLOTS, num_gpus=num_gpus, max_replicas=most, idle_timeout_s=60.0, revision="1")
            for name in (f"model-{index}" for index in range(models))
        },
        nodes={f"node-{index}": NodeSpec(f"node-{index}", gpus=gpus, cpus=640.0) for index in range(nodes)},
        queue_max_size=10_000_000,
        max_asleep=max_asleep,
    )


class Storm:
    """One ledger, its outside, and how long every event took, by kind."""

    def __init__(self, spec: PoolSpec, replicas: int, queued: int, seed: int = 7) -> None:
        self.spec = spec
        self.random = random.Random(seed)
        self.now = 0.0
        self.numbers = itertools.count(1)
        self.due: list[tuple[float, int, Callable[[], None]]] = []
        self.took: dict[str, list[float]] = defaultdict(list)
        self.names = list(spec.models)
        self.waiting: dict[str, str] = {}
        self.leases: dict[str, tuple[int, str]] = {}
        self.node_of: dict[str, str] = {}
        self.model_of: dict[str, str] = {}
        self.gone_nodes: list[str] = []
        self.began = clock()
        self.ledger = self._built(replicas, queued)
        self.build_s = clock() - self.began

    # --- the pool as it stands before the storm ---------------------------------------------------------------------

    def _built(self, replicas: int, queued: int) -> Ledger:
        """Two thirds of the models hold every place there is; the others wait for one; a few have no work at all."""
        ledger = self.ledger = Ledger(self.spec, epoch="storm", now=0.0, recovering_until=1.0)
        resident = self.names[: len(self.names) * 2 // 3]
        nodes = list(self.spec.nodes.values())
        seats = [node.name for node in nodes for _ in range(replicas // len(nodes) + 1)]
        for index in range(replicas):
            name = resident[index * len(resident) // replicas]
            uid = f"{name}#{index}"
            self._knows(uid, name, seats[index])
            ledger.decide(ReplicaStarted(name, uid, seats[index], float(index), loading=True), 0.0)
            ledger.decide(ReplicaReady(uid), 0.5)
        self.now = 1.0
        ledger.decide(Ticked(), self.now)
        idle = set(resident[::20])
        busy = [name for name in resident if name not in idle]
        places = dict.fromkeys(resident, 0)
        for uid in self.model_of.values():
            places[uid] += SLOTS
        for name in busy:
            for _ in range(places[name]):
                self.arrive(name)
        lines = [name for name in self.names if name not in idle]
        for index in range(queued):
            self.now += 20.0 / queued
            self.arrive(lines[index % len(lines)])
        return ledger

    def _knows(self, uid: str, model: str, node: str) -> None:
        self.model_of[uid] = model
        self.node_of[uid] = node

    # --- one event ----------------------------------------------------------------------------------------------------

    def tell(self, event: Event, kind: str | None = None) -> None:
        began = clock()
        commands = self.ledger.decide(event, self.now)
        self.ledger.next_deadline()
        self.took[kind or type(event).__name__].append(clock() - began)
        for command in commands:
            self._obey(command)
        for moved in self.ledger.transitions:
            if isinstance(moved, Moved):
                self._obey_move(moved)

    def at(self, after_s: float, action: Callable[[], None]) -> None:
        heapq.heappush(self.due, (self.now + after_s, next(self.numbers), action))

    def _obey(self, command: Any) -> None:
        kind = type(command)
        if kind is Grant:
            request = command.request
            self.waiting.pop(request, None)
            self.leases[request] = (command.generation, command.model)
            self.at(self.random.expovariate(1 / 15.0), lambda: self.release(request))
        elif kind is Reject:
            model = self.waiting.pop(command.request, None)
            if model is not None:
                self.arrive_later(model)
        elif kind is LoadEngine:
            uid = command.replica
            self.at(LOAD_S, lambda: self.is_ready(uid))
        elif kind is UnloadEngine:
            uid = command.replica
            self.at(UNLOAD_S, lambda: self.known(uid) and self.tell(EngineUnloaded(uid)))
        elif kind is RestartEngine:
            uid = command.replica
            self.at(UNLOAD_S, lambda: self.known(uid) and self.tell(EngineDied(uid, "it hung")))
        elif kind is EndReplica:
            uid = command.replica
            self.at(UNLOAD_S, lambda: self.ends(uid))

    def _obey_move(self, moved: Moved) -> None:
        if moved.after is ReplicaState.STARTING:
            model, node = moved.model, moved.node
            self.at(START_S, lambda: self.starts(model, node))
        elif moved.after is ReplicaState.STOPPING and moved.replica is not None:
            uid = moved.replica
            self.at(UNLOAD_S, lambda: self.ends(uid))

    def known(self, uid: str) -> bool:
        return uid in self.model_of

    # --- what is ordinary ---------------------------------------------------------------------------------------------

    def arrive(self, model: str, kind: str | None = None, timeout_s: float = 0.0) -> None:
        number = next(self.numbers)
        request = f"r{number}"
        self.waiting[request] = model
        deadline = self.now + (timeout_s or self.random.choice((60.0, 300.0, 600.0)))
        self.tell(RequestArrived(request, f"ingress-{number % HOLDERS}", model, 1 + number % 3, deadline), kind)

    def arrive_later(self, model: str) -> None:
        self.at(0.01, lambda: self.arrive(model))

    def release(self, request: str) -> None:
        lease = self.leases.pop(request, None)
        if lease is not None:
            self.tell(LeaseReleased(request, lease[0]))
            # The line stays as long as it is.
            self.arrive(lease[1] if self.random.random() < 0.95 else self.random.choice(self.names))

    def cancel(self) -> None:
        first = itertools.islice(self.waiting.items(), self.random.randrange(min(1000, len(self.waiting))), None)
        request, model = next(first)
        del self.waiting[request]
        self.tell(RequestCancelled(request))
        self.arrive_later(model)

    def starts(self, model: str, node: str) -> None:
        if node not in self.gone_nodes:
            uid = f"{model}#{next(self.numbers)}"
            self._knows(uid, model, node)
            self.tell(ReplicaStarted(model, uid, node, float(next(self.numbers))))

    def is_ready(self, uid: str) -> None:
        if self.known(uid):
            self.tell(ReplicaReady(uid))

    def ends(self, uid: str) -> None:
        if self.model_of.pop(uid, None) is not None:
            del self.node_of[uid]
            self.tell(ReplicaGone(uid))

    def some(self) -> str:
        """Any replica."""
        return self.random.choice(list(self.model_of))

    # --- what is rare ------------------------------------------------------------------------------------------------

    def burst(self) -> None:
        """A thousand requests that will all give up at one moment, unless they are served before."""
        model, until = self.names[-1], self.now + 2.0
        for _ in range(1000):
            self.arrive(model, timeout_s=until - self.now)

    def node_lost(self) -> None:
        nodes = [name for name in self.spec.nodes if name not in self.gone_nodes]
        if len(nodes) < 2:
            return
        lost = self.random.choice(nodes)
        self.gone_nodes.append(lost)
        self.tell(NodesChanged({name: self.spec.nodes[name] for name in nodes if name != lost}), "node lost")
        for uid in [uid for uid, node in self.node_of.items() if node == lost]:
            self.at(0.0, lambda uid=uid: self.ends(uid))  # type: ignore[misc]
        self.at(1.0, self.node_back)

    def node_back(self) -> None:
        self.gone_nodes.pop(0)
        nodes = {name: node for name, node in self.spec.nodes.items() if name not in self.gone_nodes}
        self.tell(NodesChanged(nodes), "node back")

    def config(self) -> None:
        """One model is changed, or its place is taken by another one."""
        name = self.random.choice(self.names)
        models = dict(self.spec.models)
        models[name] = replace(models[name], revision=str(next(self.numbers)))
        self.spec = replace(self.spec, models=models)
        self.tell(ConfigChanged(self.spec))

    def model_removed(self) -> None:
        name = self.random.choice(self.names)
        all_models = self.spec.models
        self.tell(ConfigChanged(replace(self.spec, models={k: v for k, v in all_models.items() if k != name})))
        self.at(0.5, lambda: self.tell(ConfigChanged(self.spec)))

    def holder_announced(self) -> None:
        """Whoever it is, he says all that he has: an eighth of everything."""
        holder = self.random.randrange(HOLDERS)
        held = tuple((name, lease[0]) for name, lease in self.leases.items() if int(name[1:]) % HOLDERS == holder)
        waits = tuple(name for name in self.waiting if int(name[1:]) % HOLDERS == holder)
        self.tell(HolderAnnounced(f"ingress-{holder}", held, waits))

    def load(self) -> None:
        self.tell(LoadRequested(self.random.choice(self.names), 1))

    def unload(self) -> None:
        self.tell(UnloadRequested(self.random.choice(self.names)))

    def look(self) -> None:
        for kind, view in (("snapshot", self.ledger.snapshot), ("briefs", self.ledger.briefs)):
            began = clock()
            view()
            self.took[kind].append(clock() - began)

    def tick(self) -> None:
        self.tell(Ticked())

    # --- the storm ----------------------------------------------------------------------------------------------------

    def run(self, events: int) -> None:
        """So many events. What stands before is frozen out of the garbage collection, as in the actor."""
        self.took.clear()
        rare = [
            self.cancel,
            self.cancel,
            lambda: self.tell(ReplicaGone(self._dies(self.some())), "replica died"),
            lambda: self.tell(EngineDied(self.some(), "it crashed"), "engine died"),
            lambda: self.tell(ReplicaFailed(self.some(), "out of memory"), "engine failed"),
            lambda: self.tell(ReplicaSuspected(self.some())),
            self.node_lost,
            self.config,
            self.model_removed,
            self.holder_announced,
            self.load,
            self.unload,
            self.look,
            self.burst,
        ]
        gc.collect()
        gc.freeze()
        until = events
        count, turn = 0, 0
        while count < until:
            due = self.ledger.next_deadline()
            if self.due and (due is None or self.due[0][0] <= due):
                when, _, action = heapq.heappop(self.due)
            else:
                when, action = due or self.now, self.tick
            self.now = max(self.now, when)
            action()
            count += 1
            if count % EVERY == 0:
                rare[turn % len(rare)]()
                turn += 1
        gc.unfreeze()

    def _dies(self, uid: str) -> str:
        self.model_of.pop(uid)
        self.node_of.pop(uid)
        return uid

    def one_holder_dies(self) -> float:
        """The longest of the events that end an eighth of everything, in seconds: it is done in parts."""
        self.tell(HolderDied(f"ingress-{HOLDERS - 1}"))
        while (due := self.ledger.next_deadline()) is not None and due <= self.now:
            self.tell(Ticked(), "HolderDied")
        return max(self.took["HolderDied"])

    # --- figures ------------------------------------------------------------------------------------------------------

    def figures(self) -> dict[str, float]:
        """What `bench_ledger.py` tells of this pool; ends it."""
        events = sorted(each for kind, times in self.took.items() if kind not in VIEWS for each in times)
        ms = {
            "p999_ms": events[int(len(events) * 0.999)],
            "max_ms": events[-1],
            "snapshot_ms": max(self.took["snapshot"]),
            "holder_died_ms": self.one_holder_dies(),
        }
        self.ledger.check()
        return {"build_s": round(self.build_s, 1), **{key: round(1000 * value, 2) for key, value in ms.items()}}

    def table(self) -> dict[str, tuple[int, float, float]]:
        """How often each kind came, its mean and its longest time in ms; the longest first."""
        rows = {kind: (len(took), 1000 * sum(took) / len(took), 1000 * max(took)) for kind, took in self.took.items()}
        return dict(sorted(rows.items(), key=lambda row: -row[1][2]))
