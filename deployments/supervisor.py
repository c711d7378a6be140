"""What a replica does: it carries out the ledger's orders with one engine process, and answers with events.

It is bound to its model's id and learns everything else from the order to load. An engine that dies costs the replica
nothing: its death is reported, and the ledger sends a new order to load.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from cluster.config.models import backend_class
from cluster.errors import ModelUnavailable, PoolError, ReplicaGone
from cluster.home import Home
from cluster.orders import Address, AsleepState, EngineState, Load, Order, Prefetch, Restart, Sleep, Unload, Wake
from deployments.engine_child import EngineChild, EngineDied
from deployments.host_memory import tree_mib
from deployments.kv_store.places import DiskCopy, Places, places
from deployments.nursery import SPINS
from deployments.weights import prefetch

logger = logging.getLogger("slotpool.replica")

#: What still runs when an engine is to be unloaded may take as long as this to end, in seconds, and so may the engine.
UNLOAD_S = 5.0
#: An engine goes to sleep within this time, in seconds, or is ended: sooner than the ledger loses patience.
SLEEP_S = 25.0


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
    """The engine of one replica. `follow_orders` runs until it is cancelled, then `finish`.

    What changes the engine is done in turn, one order after another. An order to unload, or to load something else,
    cuts a load or a waking short that is under way or has not begun: its process is killed, and nothing is told of it.
    """

    def __init__(
        self,
        model: str,
        replica: str,
        ledger: Ledger,
        place: Callable[[], Awaitable[Place]],
    ) -> None:
        """`place` finds out where the replica runs."""
        self._model, self._replica, self._ledger = model, replica, ledger
        self._place = place
        self.engine: EngineState | None = None
        self.failed: str | None = None
        self.asleep: AsleepState | None = None
        self.is_unloading = False
        self.devices: tuple[int, ...] = ()
        self._child: EngineChild | None = None
        self._awake: EngineState | None = None
        self._load_order: Load | None = None
        self._kv_store: Places | None = None
        self._copying = DiskCopy()
        self._loading: asyncio.Task[None] | None = None
        self._falling_asleep: asyncio.Task[None] | None = None
        self._turn = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self.is_finishing = False

    @property
    def is_loading(self) -> bool:
        """Whether an order to load, or to wake, is being carried out or will be."""
        return self._loading is not None

    async def follow_orders(self) -> None:
        """Carry out what the ledger orders."""
        seen = 0
        while True:
            seen, order = await self._ledger.orders(self._replica, seen)
            if order is not None:
                self._obey(order)

    def address(self) -> Address:
        """Where the engine listens. Raises `ReplicaGone` without one."""
        if self.engine is None:
            raise ReplicaGone(f"{self._model} is not served by this replica")
        return self.engine.address

    async def finish(self) -> None:
        """Let running calls end, then the engine process; whoever calls bounds this. The ledger hears of it first."""
        self._tell("replica_stopping")
        self.is_finishing = True
        self._cut_short()
        child = self._child
        if child is not None:
            if self.engine is None:
                child.kill()
            await child.finish()
            self._tell_of_saved(child)
        for task in self._tasks:
            task.cancel()
        await self._copying.finished()

    def _obey(self, order: Order) -> None:
        match order:
            case Load():
                if self.is_loading and order == self._load_order:
                    return  # Given again; its answer will come.
                self._cut_short()
                self._load_order, self.failed = order, None
                if self.engine is None:
                    self.devices = order.devices
                self._loading = self._run(self._in_turn(self._load, order))
            case Wake():
                if not self.is_loading:
                    self.failed = None
                    self._loading = self._run(self._in_turn(self._wake, order))
            case Unload():
                self._cut_short()
                self.is_unloading, self.engine, self.failed = True, None, None
                self._run(self._in_turn(self._unload))
            case Sleep():
                self._falling_asleep = self._run(self._in_turn(self._sleep))
            case Restart():
                self._run(self._restart(order))
            case Prefetch():
                self._run(prefetch(order.config["model_path"]))

    def _cut_short(self) -> None:
        """End the load, the waking or the falling asleep that is under way, and one that has not begun."""
        if self._loading is not None:
            self._loading.cancel()
            self._loading = self._load_order = None
        if self._falling_asleep is not None:
            self._falling_asleep.cancel()
            self._falling_asleep = None

    # --- loading ------------------------------------------------------------------------------------------------------

    async def _load(self, order: Load) -> None:
        if self.engine is not None:
            # What is loaded may be answering: without an order to unload it stays, and the ledger is told of it.
            self._loading = None
            self._tell("replica_ready", self.engine)
            return
        await self._end_child()
        self.devices, self.is_unloading = order.devices, False
        try:
            child, place = await self._start_child(order)
            self._child = child
            engine = await self._load_in(child, place, order)
        except (Exception, asyncio.CancelledError) as error:
            await self._not_loaded(error, "loading")
        else:
            self._loaded(child, engine)
            self._run(self._watch(child))

    async def _wake(self, order: Wake) -> None:
        child, engine = self._child, self._awake
        if self.engine is not None:
            self._loading = None
            self._tell("replica_ready", self.engine)
            return
        try:
            if child is None or engine is None:
                raise ModelUnavailable("the engine that slept is gone")
            said = await child.wake(self._progress)
        except (Exception, asyncio.CancelledError) as error:
            await self._not_loaded(error, "waking")
        else:
            self._loaded(child, engine._replace(memory_mib=said["memory_mib"]))

    def _loaded(self, child: EngineChild, engine: EngineState) -> None:
        self._loading, self.asleep, self._awake = None, None, None
        self.engine = engine
        self._tell("replica_ready", engine)

    async def _not_loaded(self, error: BaseException, doing: str) -> None:
        """A load or a waking has failed, its process has died, or it was cut short: nothing of it is left then."""
        await self._end_child()
        if isinstance(error, asyncio.CancelledError):
            raise error
        self._loading = self._load_order = None
        if isinstance(error, EngineDied):
            self._tell("engine_died", str(error))
            return
        is_known = isinstance(error, PoolError)
        if not is_known:
            logger.error("%s %s failed", doing, self._model, exc_info=error)
        self.failed = str(error) if is_known else f"{type(error).__name__} while {doing}"
        self._tell("replica_failed", self.failed)

    async def _start_child(self, order: Load) -> tuple[EngineChild, Place]:
        place = await self._place()
        environment = {**os.environ, "GOMP_SPINCOUNT": SPINS, **devices_of(order, os.environ)}
        python = order.config.get("python")
        if python and not backend_class(order.config).starts_command:
            return await EngineChild.start(python, place.home, environment, place.log), place
        return await EngineChild.fork(place.home, environment, place.log), place

    async def _load_in(self, child: EngineChild, place: Place, order: Load) -> EngineState:
        unix = str(place.home.folder / self._replica)
        token = secrets.token_urlsafe(32) if place.host else ""
        self._kv_store = None
        if order.kv_store is not None:
            self._kv_store = await asyncio.to_thread(places, place.home, order.kv_store)
        said = await child.load(
            {
                "model": self._model,
                "replica": self._replica,
                "config": order.config,
                "overrides": order.overrides,
                "unix": unix,
                "host": place.host,
                "token": token,
                "kv_store": self._kv_store and self._kv_store.as_dict(),
            },
            self._progress,
        )
        devices = said["devices"]
        return EngineState(
            Address(place.node, unix, place.host, said["port"], token),
            said["pid"],
            said["memory_mib"],
            None if devices is None else tuple(filter(None, devices.split(","))),
            order.revision,
            order.slots,
            said["url"],
        )

    def _progress(self, fraction: float) -> None:
        self._tell("replica_progress", fraction)

    # --- what comes after a load --------------------------------------------------------------------------------------

    async def _unload(self) -> None:
        child = self._child
        if child is not None and self.asleep is None:
            try:
                async with asyncio.timeout(UNLOAD_S):
                    await child.finish()
            except TimeoutError:
                logger.error("the engine of %s did not end within %g s and is killed", self._model, UNLOAD_S)
        await self._end_child()
        self.is_unloading = False
        self._tell("engine_unloaded")
        if child is not None:
            self._tell_of_saved(child)

    def _tell_of_saved(self, child: EngineChild) -> None:
        """An engine has ended: what it has saved is counted, and copied to the disk beside whatever comes next."""
        if child.saved_bytes and self._kv_store is not None:
            self._ledger.tell("conversations_saved", self._replica, child.saved_bytes)
            self._copying.begin(self._kv_store)

    async def _sleep(self) -> None:
        """Put what is loaded to sleep. An engine that cannot is unloaded, and so is one that is not there."""
        child, engine = self._child, self.engine
        if child is None or engine is None:
            if self.asleep is None:
                self._tell("engine_unloaded")
            else:
                self._tell("engine_asleep", *self.asleep)
            return
        self.engine, self._awake, self.is_unloading = None, engine, True
        try:
            async with asyncio.timeout(SLEEP_S):
                said = await child.sleep()
                seen_mib = await asyncio.to_thread(tree_mib, engine.pid)
        except (TimeoutError, EngineDied, PoolError, asyncio.CancelledError) as error:
            await self._end_child()
            if isinstance(error, asyncio.CancelledError):
                raise
            logger.error("the engine of %s does not sleep and is ended: %s", self._model, error)
            self.is_unloading = False
            self._tell("engine_unloaded")
            return
        # An engine may know of memory that the kernel does not count as its process's.
        self.asleep, self.is_unloading = AsleepState(max(said["host_mib"], seen_mib), said["device_mib"]), False
        self._falling_asleep = None
        self._tell("engine_asleep", *self.asleep)

    async def _watch(self, child: EngineChild) -> None:
        """Report the death of an engine that was loaded, unless it was ordered."""
        why = await asyncio.shield(child.ended)
        if self._child is child:
            self.engine = None
        async with self._turn:
            # Whoever had the turn may have ended it, or have met its death and told of it.
            if self._child is child:
                was_asleep = self.asleep is not None
                self._forget_child()
                logger.warning("the engine of %s is gone: %s", self._model, why)
                if was_asleep:
                    self._tell("engine_unloaded")
                else:
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

    async def _end_child(self) -> None:
        """End the process, whatever it does, and wait until it is gone."""
        if self._child is not None:
            await self._child.end()
        self._forget_child()

    def _forget_child(self) -> None:
        self._child = self.asleep = self._awake = None
        self.devices = ()

    def _tell(self, event: str, *what: Any) -> None:
        if not self.is_finishing:
            self._ledger.tell(event, self._replica, *what)

    async def _in_turn(self, work: Callable[..., Awaitable[None]], *order: Order) -> None:
        async with self._turn:
            await work(*order)

    def _run(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


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
