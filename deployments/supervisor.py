"""What a replica does: it carries out the ledger's orders with one engine process, and answers with events.

It is bound to its model's id and learns everything else from the order to load. An engine that dies costs the replica
nothing: its death is reported, and the ledger sends a new order to load.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from cluster.errors import PoolError, ReplicaGone
from cluster.orders import Address, Drain, EngineState, Load, Order, Restart
from deployments.engine_child import EngineChild, EngineDied, Home

logger = logging.getLogger("slotpool.replica")

#: In an engine's environment: a bounded spin at OpenMP's barriers, which is read when the library is loaded.
ENGINE_ENVIRONMENT = {"GOMP_SPINCOUNT": "200"}


class Ledger(Protocol):
    """What a supervisor needs of the ledger's client."""

    def tell(self, method: str, *args: Any) -> None:
        """A one-way message."""

    async def orders(self, replica: str, seen: int) -> tuple[int, Order | None]:
        """The order to this replica once it is another than the one of the version seen. Never raises, waits long."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a replica runs: Ray's node, the folder of its engine's socket, a file for its engine's log.

    `host` is where the engine listens for other nodes; empty when there are none.
    """

    node: str
    home: Home
    log: Path
    host: str = ""


class Supervisor:
    """The engine of one replica. `follow_orders` runs until it is cancelled, then `finish`."""

    def __init__(
        self,
        model: str,
        replica: str,
        ledger: Ledger,
        place: Callable[[], Awaitable[Place]],
        on_drain: Callable[[], Awaitable[None]],
    ) -> None:
        """`place` finds out where the replica runs; `on_drain` is called when the ledger drains it."""
        self._model, self._replica, self._ledger = model, replica, ledger
        self._place, self._on_drain = place, on_drain
        self.engine: EngineState | None = None
        self.failed: str | None = None
        self.is_loading = False
        self.loading_on: tuple[int, ...] = ()
        self._child: EngineChild | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_finishing = False

    async def follow_orders(self) -> None:
        """Carry out what the ledger orders."""
        seen = 0
        while True:
            seen, order = await self._ledger.orders(self._replica, seen)
            if isinstance(order, Load) and not (self.is_loading or self.engine is not None):
                self.is_loading, self.failed, self.loading_on = True, None, order.devices
                self._run(self._load(order))
            elif isinstance(order, Restart):
                self._run(self._restart(order))
            elif isinstance(order, Drain):
                self._run(self._on_drain())

    async def load_of_engine(self) -> tuple[int, int] | None:
        """How many calls run in the engine and how many there have been; None without one that answers."""
        child = self._child
        return None if child is None or self.engine is None else await child.ping()

    def address(self) -> Address:
        """Where the engine listens. Raises `ReplicaGone` without one."""
        if self.engine is None:
            raise ReplicaGone(f"{self._model} is not served by this replica")
        return self.engine.address

    async def finish(self) -> None:
        """Let running calls end, then the engine process; whoever calls bounds this."""
        self._is_finishing = True
        child = self._child
        if child is not None:
            if self.engine is None:
                child.kill()
            await child.finish()
        for task in self._tasks:
            task.cancel()

    async def _load(self, order: Load) -> None:
        try:
            child, place = await self._start_child(order)
            self._child = child
            engine = await self._load_in(child, place, order)
        except EngineDied as error:
            self.is_loading = False
            self._end_child()
            self._tell("engine_died", str(error))
        except Exception as error:
            is_known = isinstance(error, PoolError)
            if not is_known:
                logger.exception("loading %s failed", self._model)
            self.is_loading = False
            self.failed = str(error) if is_known else f"{type(error).__name__} while loading"
            self._end_child()
            self._tell("replica_failed", self.failed)
        else:
            self.is_loading, self.engine = False, engine
            self._tell("replica_ready", engine)
            self._run(self._watch(child))

    async def _start_child(self, order: Load) -> tuple[EngineChild, Place]:
        place = await self._place()
        environment = {**os.environ, **ENGINE_ENVIRONMENT, **devices_of(order, os.environ)}
        python = order.config.get("python")
        if python:
            return await EngineChild.start(python, place.home, environment, place.log), place
        return await EngineChild.fork(place.home, environment, place.log), place

    async def _load_in(self, child: EngineChild, place: Place, order: Load) -> EngineState:
        unix = str(place.home.folder / self._replica)
        token = secrets.token_urlsafe(32) if place.host else ""
        said = await child.load(
            {
                "model": self._model,
                "replica": self._replica,
                "config": order.config,
                "overrides": order.overrides,
                "unix": unix,
                "host": place.host,
                "token": token,
            },
            lambda fraction: self._tell("replica_progress", fraction),
        )
        devices = said["devices"]
        return EngineState(
            Address(place.node, unix, place.host, said["port"], token),
            said["pid"],
            said["memory_mib"],
            None if devices is None else tuple(filter(None, devices.split(","))),
            order.revision,
        )

    async def _watch(self, child: EngineChild) -> None:
        """Report the death of a loaded engine."""
        why = await asyncio.shield(child.ended)
        self.engine = self._child = None
        logger.warning("the engine of %s is gone: %s", self._model, why)
        self._tell("engine_died", why)

    async def _restart(self, order: Restart) -> None:
        """Kill an engine that hangs. One that answers does not, however slow it was: its streams go on."""
        child = self._child
        if child is None:
            return
        if await child.ping() is not None:
            logger.warning("the engine of %s answers, and is not restarted: %s", self._model, order.reason)
            if self.engine is not None:
                self._tell("replica_ready", self.engine)
            return
        logger.error("the engine of %s hangs and is killed: %s", self._model, order.reason)
        child.kill()

    def _end_child(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child = None

    def _tell(self, event: str, *what: Any) -> None:
        if not self._is_finishing:
            self._ledger.tell(event, self._replica, *what)

    def _run(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def devices_of(order: Load, environment: Any) -> dict[str, str]:
    """`CUDA_VISIBLE_DEVICES` for an engine: the assigned ones of those that this process may see.

    Where Ray itself chose a device for this process, that is the one, whatever was assigned: the ledger hears of it
    when the engine is ready.
    """
    if not order.num_gpus:
        return {"CUDA_VISIBLE_DEVICES": ""}
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    ray_chooses = not environment.get("RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES")
    if not order.devices or (visible and ray_chooses):
        return {}
    names = visible.split(",") if visible else []
    return {
        "CUDA_VISIBLE_DEVICES": ",".join(
            names[device] if device < len(names) else str(device) for device in order.devices
        )
    }
