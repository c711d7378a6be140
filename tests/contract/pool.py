"""A pool of one model without Ray: the gateway, a supervisor and its engine process are the real ones, the ledger is
forty lines. So a test meets an engine as a client does, and may kill its process or load it again."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import uuid
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from cluster.config import ModelConfig, PoolConfig
from cluster.errors import ModelUnavailable
from cluster.ledger.events import Grant
from cluster.orders import EngineState, Load, Order, Sleep, Unload, Wake
from cluster.request import Request
from cluster.waiting import Signal
from deployments.gateway import Gateway
from deployments.host_memory import tree_mib, tree_of
from deployments.limits import Limits
from deployments.link import Links
from deployments.nursery import SOCKET_NAME
from deployments.request_log import RequestLog
from deployments.requests import parse_request
from deployments.schemas import CHAT
from deployments.supervisor import Place, Supervisor
from tests.unit.raylet import Raylet, nursery_pid, started_raylet

MODEL, REPLICA, NODE = "m", "uid", "here"
SLOTS = 8
#: A real engine loads within this time, in seconds, on a machine that does other things as well.
LOAD_S = 180.0


class Ledger:
    """What the gateway and a supervisor need of the ledger, for one replica: it leases its slots and gives its orders.

    An engine that has died is loaded again at once. A load that fails refuses whoever waits.
    """

    def __init__(self, slots: int, replica: str = REPLICA) -> None:
        self.engine: EngineState | None = None
        self.failed: str | None = None
        self.leases: dict[str, Grant] = {}
        self.load_order: Load | None = None
        self.told: list[str] = []
        self._replica = replica
        self._free = set(range(slots))
        self._orders: asyncio.Queue[Order] = asyncio.Queue()
        self._changed = Signal()
        self._has_server = self._lost_server = False

    def give(self, order: Order) -> None:
        if isinstance(order, Load):
            self.load_order, self.failed = order, None
        self._orders.put_nowait(order)

    async def orders(self, replica: str, seen: int) -> tuple[int, Order | None]:
        return seen + 1, await self._orders.get()

    def tell(self, event: str, *what: Any) -> None:
        if event == "replica_progress":
            return
        self.told.append(event)
        match event:
            case "replica_ready":
                self.engine = what[1]
            case "replica_failed":
                self.failed = what[1]
            case "engine_died":
                self.engine = None
                assert self.load_order is not None
                self.give(self.load_order)
            case "engine_unloaded" | "engine_asleep":
                self.engine = None
            case "server_lost":
                self._has_server, self._lost_server = False, True
        self._changed.fire()

    def find_server(self) -> None:
        """The replica is an external server, and it serves."""
        self._has_server = True
        self._changed.fire()

    async def lost_server(self) -> None:
        """Wait until that server was lost."""
        while not await self._changed.until(lambda: self._lost_server, LOAD_S):
            pass
        self._lost_server = False

    async def hears(self, *events: str) -> str:
        """Wait until the supervisor tells one of these, after the call; which."""
        before = len(self.told)

        def told() -> str | None:
            return next((each for each in self.told[before:] if each in events), None)

        assert await self._changed.until(lambda: told() is not None, LOAD_S), f"{events}: {self.told}"
        return told() or ""

    async def acquire(self, request: Request) -> Grant:
        def is_decided() -> bool:
            return self.failed is not None or bool((self.engine or self._has_server) and self._free)

        assert await self._changed.until(is_decided, LOAD_S), self.told
        if self.failed is not None:
            raise ModelUnavailable(self.failed)
        slots = tuple(self._free.pop() for _ in range(min(request.slots, len(self._free))))
        address = None if self.engine is None else self.engine.address
        grant = Grant(request.id, "holder", request.model, self._replica, slots, 1, 0.0, 0.0, address)
        self.leases[request.id] = grant
        return grant

    def release(self, lease: Grant, outcome: Any = None) -> None:
        self._free |= set(self.leases.pop(lease.request).slots)
        self._changed.fire()

    async def waiting(self, request: str) -> None:
        return None


class ContractGateway(Gateway):
    """The gateway on that ledger."""

    def __init__(self, config: PoolConfig, ledger: Ledger) -> None:
        self.config = config
        self.ledger: Any = ledger
        self.limits = Limits()
        self.request_log = RequestLog()
        self._links = Links(NODE)
        self._upstreams = None

    async def close(self) -> None:
        """End its connections."""
        self._links.close()
        if self._upstreams is not None:
            await self._upstreams.close()


class OneModel:
    """A running pool with one model, `MODEL`, as its clients meet it: what they send is checked as the routes do."""

    def __init__(self, config: PoolConfig, ledger: Ledger) -> None:
        self.config, self.ledger = config, ledger
        self.gateway = ContractGateway(config, ledger)

    async def stream(self, fields: dict[str, Any], path: str = CHAT) -> AsyncGenerator[bytes, None]:
        """What a client would get. Raises the `PoolError` that is its HTTP answer before the first byte."""
        request, body = parse_request(self.config, path, {"model": MODEL, **fields}, request_id=uuid.uuid4().hex)
        async with contextlib.aclosing(self.gateway.stream(request, body)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def body(self, fields: dict[str, Any], path: str = CHAT) -> dict[str, Any]:
        """The answer to a request that does not stream."""
        answer: dict[str, Any] = json.loads(b"".join([chunk async for chunk in self.stream(fields, path)]))
        return answer

    async def events(self, fields: dict[str, Any], path: str = CHAT) -> list[dict[str, Any]]:
        """The events of a stream, after checking how it is framed; an error event is the last of them."""
        return [event async for event in self.live(fields, path)]

    async def live(self, fields: dict[str, Any], path: str = CHAT) -> AsyncGenerator[dict[str, Any], None]:
        """The same, as they come."""
        ended = False
        async with contextlib.aclosing(self.stream({**fields, "stream": True}, path)) as chunks:
            async for chunk in chunks:
                assert chunk.endswith(b"\n\n"), "an event was split"
                for part in chunk.decode().removesuffix("\n\n").split("\n\n"):
                    assert not ended, "nothing comes behind the end"
                    if part.startswith(":"):
                        continue
                    assert part.startswith("data: ")
                    if part == "data: [DONE]":
                        ended = True
                        continue
                    event: dict[str, Any] = json.loads(part.removeprefix("data: "))
                    ended = "error" in event
                    yield event
        assert ended

    async def load(self) -> None:
        """Have the model loaded, if it is not."""
        raise NotImplementedError

    async def unload(self) -> None:
        """Drain and unload the model; what runs may end."""
        raise NotImplementedError

    async def sleep_and_wake(self) -> bool:
        """Put the engine to sleep with its weights in the host's memory, and wake it again; False if it has ended."""
        raise NotImplementedError

    async def fail_to_load(self, model: dict[str, Any]) -> str:
        """Try to load another model in its place, which is unloaded; why that has failed."""
        raise NotImplementedError

    def kill(self) -> None:
        """Kill what runs the model, as the kernel does when memory runs out."""
        raise NotImplementedError

    def held_mib(self) -> int:
        """The memory of all processes that were started for the model, in MiB."""
        raise NotImplementedError

    def processes(self) -> set[int]:
        """All of them, and some of the test's own."""
        raise NotImplementedError

    def descriptors(self) -> int:
        """The open files of the processes that stay when the model is unloaded."""
        raise NotImplementedError


class Supervised(OneModel):
    """The model on an engine process of its own."""

    def __init__(self, config: PoolConfig, ledger: Ledger, raylet: Raylet) -> None:
        super().__init__(config, ledger)
        self.home = raylet.home
        self.supervisor = Supervisor(MODEL, REPLICA, ledger, self._place)

    @classmethod
    @contextlib.asynccontextmanager
    async def running(cls, model: dict[str, Any]) -> AsyncGenerator[Supervised, None]:
        """A pool that ends with the context. It loads the model first."""
        config = PoolConfig.model_validate({"models": {MODEL: model}})
        with started_raylet() as raylet:
            pool = cls(config, Ledger(config.models[MODEL].target_inflight), raylet)
            following = asyncio.create_task(pool.supervisor.follow_orders())
            try:
                await pool.load()
                yield pool
            finally:
                following.cancel()
                pool.ledger.give(Unload("the tests are over"))
                await asyncio.wait_for(pool.supervisor.finish(), 30)

    async def _place(self) -> Place:
        return Place(NODE, self.home, self.log)

    @property
    def log(self) -> Path:
        """What the engine process says."""
        return self.home.folder / "engine.log"

    @property
    def pid(self) -> int:
        """The engine's process."""
        assert self.ledger.engine is not None
        return self.ledger.engine.pid

    async def load(self) -> None:
        if self.ledger.engine is None:
            self.ledger.give(self._order(self.config.models[MODEL]))
            await self.ledger.hears("replica_ready")

    async def unload(self) -> None:
        self.ledger.give(Unload("a test says so"))
        await self.ledger.hears("engine_unloaded")

    async def sleep_and_wake(self) -> bool:
        self.ledger.give(Sleep())
        if await self.ledger.hears("engine_asleep", "engine_unloaded") == "engine_unloaded":
            return False
        self.ledger.give(Wake(()))
        await self.ledger.hears("replica_ready")
        return True

    async def fail_to_load(self, model: dict[str, Any]) -> str:
        self.ledger.give(self._order(ModelConfig.model_validate(model)))
        await self.ledger.hears("replica_failed")
        assert self.ledger.failed is not None
        return self.ledger.failed

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def held_mib(self) -> int:
        return sum(map(tree_mib, self._roots()))

    def processes(self) -> set[int]:
        return {pid for root in self._roots() for pid in tree_of(root)}

    def descriptors(self) -> int:
        return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in (os.getpid(), *self._nursery()))

    def _roots(self) -> list[int]:
        # Another environment's engine is a child of this process, the others are the nursery's.
        tasks = Path(f"/proc/{os.getpid()}/task").iterdir()
        return [*self._nursery(), *(int(pid) for task in tasks for pid in (task / "children").read_text().split())]

    def _nursery(self) -> list[int]:
        # Where all engines are another environment's, nobody has started one.
        return [nursery_pid(self.home)] if (self.home.folder / SOCKET_NAME).exists() else []

    def _order(self, model: ModelConfig) -> Load:
        config = model.model_dump(mode="json", by_alias=False)
        return Load(MODEL, config, {}, (), model.revision, model.num_gpus, model.target_inflight)
