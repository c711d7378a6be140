"""A supervisor between a scripted ledger and real engine processes: what it is ordered, and what it tells."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from cluster.config import ModelConfig
from cluster.errors import ReplicaGone
from cluster.orders import Drain, EngineState, Load, Order, Restart
from deployments import engine_child
from deployments.supervisor import Place, Supervisor, devices_of
from tests.unit.raylet import Raylet, lives, started_raylet


@pytest.fixture(scope="module")
def raylet() -> Iterator[Raylet]:
    with started_raylet() as raylet:
        yield raylet


class Ledger:
    """Gives the orders that a test puts, and keeps what it is told."""

    def __init__(self) -> None:
        self.orders_: asyncio.Queue[Order] = asyncio.Queue()
        self.told: asyncio.Queue[tuple[Any, ...]] = asyncio.Queue()

    def tell(self, method: str, *args: Any) -> None:
        if method != "replica_progress":
            self.told.put_nowait((method, *args))

    async def orders(self, replica: str, seen: int) -> tuple[int, Order]:
        return seen + 1, await self.orders_.get()

    def order(self, **engine_kwargs: Any) -> None:
        model: dict[str, Any] = {"backend": "fake", "engine_kwargs": engine_kwargs}
        self.load(model)

    def load(self, model: dict[str, Any], num_gpus: float = 1.0) -> None:
        config = ModelConfig.model_validate(model).model_dump(mode="json", by_alias=False)
        self.orders_.put_nowait(Load("m", config, {}, (1,), "rev", num_gpus))

    async def hears(self) -> tuple[Any, ...]:
        return await asyncio.wait_for(self.told.get(), 30)


@pytest.fixture
async def ledger() -> Ledger:
    return Ledger()


@pytest.fixture
async def supervisor(raylet: Raylet, ledger: Ledger) -> AsyncIterator[Supervisor]:
    async def place() -> Place:
        return Place("here", raylet.home, raylet.home.folder / "log", host)

    async def drain() -> None:
        ledger.told.put_nowait(("drains",))

    host = ""
    supervisor = Supervisor("m", "uid", ledger, place, drain)
    following = asyncio.create_task(supervisor.follow_orders())
    yield supervisor
    following.cancel()
    await asyncio.wait_for(supervisor.finish(), 20)


async def test_a_drain_is_passed_on_and_ends_nothing(supervisor: Supervisor, ledger: Ledger):
    ledger.order()
    assert (await ledger.hears())[0] == "replica_ready"
    ledger.orders_.put_nowait(Drain())
    assert await ledger.hears() == ("drains",)
    assert supervisor.engine is not None


async def test_an_engine_is_loaded_as_ordered_and_reported(supervisor: Supervisor, ledger: Ledger):
    with pytest.raises(ReplicaGone):
        supervisor.address()
    ledger.order()
    kind, replica, engine = await ledger.hears()
    assert (kind, replica) == ("replica_ready", "uid")
    assert isinstance(engine, EngineState)
    assert engine == supervisor.engine
    assert (engine.devices, engine.revision, engine.address.node, engine.address.port) == (("1",), "rev", "here", 0)
    assert lives(engine.pid)
    assert supervisor.address() == engine.address
    assert await supervisor.load_of_engine() == (0, 0)
    ledger.order()
    ledger.orders_.put_nowait(Restart("it seemed to hang"))
    assert await ledger.hears() == ("replica_ready", "uid", engine), "it answers, and no second one was loaded"


@pytest.mark.parametrize("fatal", [signal.SIGKILL, signal.SIGSEGV])
async def test_a_death_is_told_and_the_same_supervisor_loads_again(
    supervisor: Supervisor, ledger: Ledger, fatal: signal.Signals
):
    ledger.order()
    _, _, engine = await ledger.hears()
    os.kill(engine.pid, fatal)
    kind, replica, why = await ledger.hears()
    assert (kind, replica) == ("engine_died", "uid")
    assert fatal.name in why
    assert supervisor.engine is None
    ledger.order()
    kind, _, again = await ledger.hears()
    assert kind == "replica_ready"
    assert again.pid != engine.pid


async def test_an_engine_that_hangs_is_killed_when_ordered(
    supervisor: Supervisor, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(engine_child, "PING_S", 0.2)
    ledger.order()
    _, _, engine = await ledger.hears()
    os.kill(engine.pid, signal.SIGSTOP)
    ledger.orders_.put_nowait(Restart("it hangs"))
    assert (await ledger.hears())[0] == "engine_died"
    assert not lives(engine.pid)


async def test_a_load_that_fails_leaves_no_process(supervisor: Supervisor, ledger: Ledger):
    ledger.order(fault="load_fails")
    assert await ledger.hears() == ("replica_failed", "uid", "m fails to load, as configured")
    assert supervisor.failed == "m fails to load, as configured"
    ledger.order()
    assert (await ledger.hears())[0] == "replica_ready"
    assert supervisor.failed is None


async def test_a_load_that_dies_is_told(supervisor: Supervisor, ledger: Ledger):
    ledger.order(fault="load_hangs")
    while supervisor._child is None:
        await asyncio.sleep(0.01)
    os.kill(supervisor._child.pid, signal.SIGABRT)
    kind, _, why = await ledger.hears()
    assert (kind, "SIGABRT" in why) == ("engine_died", True)
    assert not supervisor.is_loading


async def test_a_supervisor_that_finishes_while_it_loads_ends_the_load(supervisor: Supervisor, ledger: Ledger):
    ledger.order(fault="load_hangs")
    while supervisor._child is None:
        await asyncio.sleep(0.01)
    pid = supervisor._child.pid
    await asyncio.wait_for(supervisor.finish(), 10)
    assert not lives(pid)
    assert ledger.told.empty()


@pytest.mark.parametrize(
    ("environment", "devices", "num_gpus", "expected"),
    [
        ({}, (0,), 0.0, ""),
        ({}, (2, 3), 2.0, "2,3"),
        ({"CUDA_VISIBLE_DEVICES": "5,GPU-a,7", "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}, (1,), 1.0, "GPU-a"),
        ({"CUDA_VISIBLE_DEVICES": "5", "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}, (1,), 1.0, "1"),
        ({"CUDA_VISIBLE_DEVICES": "5"}, (0,), 1.0, None),
        ({}, (), 1.0, None),
    ],
)
def test_devices(environment: dict[str, str], devices: tuple[int, ...], num_gpus: float, expected: str | None):
    order = Load("m", {}, {}, devices, "", num_gpus)
    assert devices_of(order, environment).get("CUDA_VISIBLE_DEVICES") == expected


async def test_an_engine_of_another_environment_is_run_by_its_interpreter(supervisor: Supervisor, ledger: Ledger):
    config = ModelConfig.model_validate({"backend": "fake"}).model_dump(mode="json", by_alias=False)
    ledger.orders_.put_nowait(Load("m", {**config, "python": sys.executable}, {}, (), "rev", 0.0))
    kind, *rest = await ledger.hears()
    if "python" in ModelConfig.model_fields:
        assert kind == "replica_ready"
        assert rest[1].devices == ()
