"""What a replica does beside its engine: spare processes for whoever comes next, and the detour through Serve."""

from __future__ import annotations

import asyncio

import pytest

from cluster.errors import ReplicaGone
from deployments import replica
from deployments.link import Links
from deployments.replica import SPARES, Replica
from deployments.supervisor import Supervisor


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many spare processes were asked for, each time."""
    asked: list[int] = []
    monkeypatch.setattr(replica.effects, "start_spare_processes", asked.append)
    monkeypatch.setattr(replica, "SPARES_AFTER_S", 0.0)
    monkeypatch.setattr(replica, "PAUSE_S", 0.05)
    return asked


class Engine(Supervisor):
    """Says what the test wants: running calls, and all that there were."""

    def __init__(self) -> None:
        self.load: tuple[int, int] | None = None
        self.engine = None
        self._model = "m"

    async def load_of_engine(self) -> tuple[int, int] | None:
        return self.load


def bare_replica() -> tuple[Replica, Engine]:
    """One without Serve around it, and with an engine that only says how busy it is."""
    bare, engine = object.__new__(Replica), Engine()
    bare._supervisor, bare._model = engine, "m"
    return bare, engine


async def test_spare_processes_wait_for_a_pause_in_the_requests(started: list[int]) -> None:
    busy, engine = bare_replica()
    keeping = asyncio.create_task(busy._keep_spares())
    await asyncio.sleep(0.15)
    assert started == [], "it loads"
    engine.load = (1, 1)
    await asyncio.sleep(0.15)
    assert started == [], "a stream runs"
    for calls in range(2, 8):
        engine.load = (0, calls)
        await asyncio.sleep(0.03)
    assert started == [], "another one came at once"
    await asyncio.wait_for(keeping, 5)
    assert started == [SPARES]


async def test_a_busy_replica_that_drains_has_a_process_started_for_its_successor(started: list[int]) -> None:
    busy, engine = bare_replica()
    await busy._help_successor()
    assert started == [], "nothing runs here: the successor starts right now, and by itself"
    engine.load = (1, 1)
    await busy._help_successor()
    assert started == [1]


async def test_the_detour_without_an_engine_is_refused() -> None:
    bare, _ = bare_replica()
    bare._links = Links("here")
    with pytest.raises(ReplicaGone):
        await anext(bare.relay(b"", b""))
