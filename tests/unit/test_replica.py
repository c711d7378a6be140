"""What a replica does beside answering: reports of a load, and spare processes for whoever comes next."""

from __future__ import annotations

import asyncio

import pytest

from deployments import replica
from deployments.replica import SPARES, Replica, at_most_every


def test_a_load_with_many_steps_is_reported_now_and_then() -> None:
    told: list[float] = []
    often = at_most_every(3600.0, told.append)
    for step in range(100):
        often(step / 100)
    always = at_most_every(0.0, told.append)
    always(0.5)
    always(0.6)
    assert told == [0.0, 0.5, 0.6]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many spare processes were asked for, each time."""
    asked: list[int] = []
    monkeypatch.setattr(replica.effects, "start_spare_processes", asked.append)
    monkeypatch.setattr(replica, "SPARES_AFTER_S", 0.0)
    monkeypatch.setattr(replica, "PAUSE_S", 0.05)
    return asked


def bare_replica() -> Replica:
    """One without Serve around it, and without an engine."""
    bare = object.__new__(Replica)
    bare._active = bare._calls = 0
    bare._idle = asyncio.Event()
    return bare


async def test_spare_processes_wait_for_a_pause_in_the_requests(started: list[int]) -> None:
    busy = bare_replica()
    keeping = asyncio.create_task(busy._keep_spares())
    await asyncio.sleep(0.1)
    assert started == [], "a stream runs"
    busy._idle.set()
    await asyncio.sleep(0.02)
    busy._calls += 1
    await asyncio.sleep(0.05)
    assert started == [], "another one came at once"
    await asyncio.wait_for(keeping, 1)
    assert started == [SPARES]


async def test_a_busy_replica_whose_door_closes_has_a_process_started_for_its_successor(started: list[int]) -> None:
    class Ledger:
        def __init__(self) -> None:
            self.closed = asyncio.Event()

        async def drained(self, uid: str) -> None:
            await self.closed.wait()
            self.closed.clear()

    busy = bare_replica()
    ledger = Ledger()
    busy._uid, busy._ledger = "u", ledger  # type: ignore[assignment]
    helping = asyncio.create_task(busy._help_successor())
    ledger.closed.set()
    await asyncio.sleep(0.05)
    assert started == [], "nothing runs here: the successor starts right now, and by itself"
    busy._active = 1
    ledger.closed.set()
    await asyncio.sleep(0.05)
    assert started == [1]
    helping.cancel()
