"""The ledger's actor and its client without Ray: plain objects in one event loop, and a cluster made up by the test."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import pytest
from ray.exceptions import RayActorError

from cluster import effects, watches
from cluster.actor import LedgerActor
from cluster.announcements import HolderState, ReplicaState
from cluster.config import load_config
from cluster.config.version import Configuration
from cluster.ledger.events import Grant
from cluster.ledger.specs import NodeSpec
from cluster.orders import Address, EngineState, Load

DEPLOYED = 1000.0


def configuration(models: dict[str, Any], version: tuple[float, int] = (DEPLOYED, 0), **pool: Any) -> Configuration:
    fakes = {name: {"backend": "fake", **fields} for name, fields in models.items()}
    return Configuration(version, load_config({"models": fakes, **pool}, environ={}))


#: Two devices, and two models of which each takes one.
MODELS = {"a": {"num_gpus": 1, "target_inflight": 2, "max_replicas": 2}, "b": {"num_gpus": 1}}


class Cluster:
    """What Ray would do for actors: their deaths come from the test, and nothing is really ended."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.restarted = False
        self.nodes = {"n": NodeSpec("n", gpus=2, cpus=8.0)}
        self.dead: asyncio.Queue[str] = asyncio.Queue()
        self.ended_lives = 0
        self.killed: list[str] = []
        self.living: set[str] = set()
        self.lives: list[LedgerActor] = []
        self.parked: set[asyncio.Future[Any]] = set()
        for name in ("dead_actors", "is_dead", "end_process", "kill_replica", "living_replicas"):
            monkeypatch.setattr(effects, name, getattr(self, f"_{name}"))
        monkeypatch.setattr(effects, "was_restarted", lambda: self.restarted)
        monkeypatch.setattr(effects, "Machines", lambda: self)
        monkeypatch.setattr(watches, "Reservation", lambda: self)
        monkeypatch.setattr(effects, "answer_of", asyncio.ensure_future)

    async def life(self, configuration: Configuration, *, restarted: bool = False) -> LedgerActor:
        """A new life of the ledger, which knows its machines already."""
        self.restarted = restarted
        actor = LedgerActor(configuration)
        self.lives.append(actor)
        await turns()
        return actor

    def park(self, call: Coroutine[Any, Any, Any]) -> asyncio.Future[Any]:
        """Make a call that waits, and end it with the test."""
        parked = asyncio.ensure_future(call)
        self.parked.add(parked)
        return parked

    async def serve(self, actor: LedgerActor, model: str, replica: str) -> Load:
        """A replica of the model comes up, is ordered to load, and is ready; the order."""
        if not actor._desired.get(model):
            self.park(actor.load(model, 1))
            await turns()
        self.park(actor.attach_replica(started(model, replica)))
        _, order = await actor.orders(replica, 0, 5.0)
        assert isinstance(order, Load)
        await actor.replica_ready(replica, engine(order.revision))
        return order

    def close(self) -> None:
        for task in [*self.parked, *(task for actor in self.lives for task in actor._tasks)]:
            task.cancel()
        for actor in self.lives:
            actor._arm_timer(None)
            actor._leases.stop()

    async def hold(self, nodes: dict[str, NodeSpec], **_: bool) -> dict[str, NodeSpec]:
        return nodes

    async def read(self, memory_mib: int, kv_store: object) -> dict[str, NodeSpec]:
        return self.nodes

    async def ask_devices(self) -> bool:
        return False

    async def _dead_actors(self) -> AsyncIterator[str]:
        while True:
            yield await self.dead.get()

    async def _is_dead(self, actor_id: str) -> bool:
        return False

    async def _living_replicas(self) -> set[str]:
        return self.living

    def _end_process(self) -> None:
        self.ended_lives += 1

    async def _kill_replica(self, replica: str) -> None:
        self.killed.append(replica)


class Handle:
    """A handle of the actor, as Ray gives it: calls go to the present life; the test loses or hangs it."""

    def __init__(self, actor: LedgerActor) -> None:
        self.actor = actor
        self.is_lost = False
        self.hangs = False
        self.calls: list[str] = []
        self._running: set[asyncio.Task[Any]] = set()

    def __getattr__(self, method: str) -> _Method:
        return _Method(self, method)

    def lose(self) -> None:
        """The actor's process is gone: all calls end."""
        self.is_lost = True
        for task in self._running:
            task.cancel()

    def come_back(self, actor: LedgerActor) -> None:
        self.actor = actor
        self.is_lost = False

    async def call(self, method: str, args: Any, kwargs: Any) -> Any:
        if self.hangs:
            await asyncio.Event().wait()
        if self.is_lost:
            raise RayActorError
        running = asyncio.ensure_future(getattr(self.actor, method)(*args, **kwargs))
        self._running.add(running)
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            if running.cancelled():
                raise RayActorError from None
            raise
        finally:
            self._running.discard(running)


class _Method:
    def __init__(self, handle: Handle, name: str) -> None:
        self._handle = handle
        self._name = name

    def remote(self, *args: Any, **kwargs: Any) -> asyncio.Task[Any]:
        self._handle.calls.append(self._name)
        called = asyncio.ensure_future(self._handle.call(self._name, args, kwargs))
        # As with Ray, nobody hears of the failure of a call whose answer is not waited for.
        called.add_done_callback(lambda task: task.cancelled() or task.exception())
        return called


async def turns(count: int = 20) -> None:
    """Let everything that is ready run."""
    for _ in range(count):
        await asyncio.sleep(0)


def engine(revision: str = "", *, memory_mib: int | None = None) -> EngineState:
    return EngineState(Address("n", "/nowhere"), 1, memory_mib, None, revision)


def started(model: str, replica: str, **fields: Any) -> ReplicaState:
    return ReplicaState(model, replica, f"actor-of-{replica}", "n", 1.0, **fields)


def holder(configuration: Configuration, *leases: Grant, waiting: tuple[str, ...] = (), sent: int = 0) -> HolderState:
    return HolderState("h", "actor-of-h", configuration, leases, waiting, sent)
