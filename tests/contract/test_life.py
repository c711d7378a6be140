"""An engine from load to unload: cancelled, killed, drained, and loaded again; nothing of it is left."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
import uuid
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import PoolError
from tests.contract.entry import Entry
from tests.contract.pool import LOAD_S, MODEL, SLOTS, OneModel
from tests.contract.said import pieces_of, text_of
from tests.unit.engines.drive import SEA, ask
from tests.unit.raylet import lives

#: How often a model is loaded and unloaded; by hand, 20 times.
LOADS = int(os.environ.get("SLOTPOOL_LOADS", "2"))
#: What `multiprocessing` calls semaphores and memory that processes share.
SHARED = ("sem.mp-", "psm_")
#: A slot is free this much after its client has left, in seconds.
FREE_S = 1.0


def endless(topic: str) -> dict[str, Any]:
    """A request that runs for much longer than a test."""
    return ask(f"Count. {topic}", max_tokens=400, ignore_eos=True)


async def first_piece_s(engine: OneModel, tokens: int = 0) -> float:
    """How long a short answer takes to begin, to a prompt that no cache holds and that has so many tokens at least."""
    asked = time.monotonic()
    prompt = f"Hi, {uuid.uuid4().hex}. {'word ' * tokens}"
    async with contextlib.aclosing(engine.live(ask(prompt, max_tokens=2))) as events:
        async for event in events:
            if pieces_of([event]):
                return time.monotonic() - asked
    raise AssertionError("it says nothing")


async def free_by_s(engine: OneModel, entry: Entry) -> float:
    """How long a short answer may take to begin where all slots were just left: what it takes on this machine, and the
    time within which slots must be free.

    That is beyond what must be evaluated to its end. A server of another kind must first see that its client has left.
    """
    usual_s = max([await first_piece_s(engine) for _ in range(2)])
    batch_s = await first_piece_s(engine, entry.batch) if entry.batch else 0.0
    return usual_s + FREE_S + entry.looks_s + batch_s


async def leased(engine: OneModel, slots: int) -> None:
    """Wait until so many slots are leased."""
    async with asyncio.timeout(LOAD_S):
        while len(engine.ledger.leases) < slots:
            await asyncio.sleep(0.01)


async def begun(engine: OneModel, fields: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
    """A stream whose first piece of text is there."""
    events = engine.live(fields)
    async for event in events:
        if pieces_of([event]):
            return events
    raise AssertionError("it says nothing")


async def test_a_client_that_leaves_in_mid_stream_frees_its_slot(engine: OneModel, entry: Entry):
    # The next token tells a server that its reader has left.
    soon_s = await free_by_s(engine, entry) - entry.looks_s
    streams = await asyncio.gather(*(begun(engine, endless(str(number))) for number in range(SLOTS)))
    assert len(engine.ledger.leases) == SLOTS
    await asyncio.gather(*(stream.aclose() for stream in streams))
    assert not engine.ledger.leases
    assert await first_piece_s(engine) < soon_s


async def test_a_client_that_leaves_before_the_first_token_frees_its_slot(engine: OneModel, entry: Entry):
    soon_s = await free_by_s(engine, entry)
    prompts = [f"{number} " + " ".join(map(str, range(number, number + 250))) for number in range(SLOTS)]
    readers = [asyncio.create_task(engine.events(ask(prompt, max_tokens=20))) for prompt in prompts]
    await leased(engine, SLOTS)
    # So that prompts are being evaluated.
    await asyncio.sleep(0.1)
    for reader in readers:
        reader.cancel()
    await asyncio.gather(*readers, return_exceptions=True)
    assert not engine.ledger.leases
    assert await first_piece_s(engine) < soon_s


async def test_an_engine_that_is_killed_costs_its_streams_an_error_event_and_is_replaced(engine: OneModel):
    stream = await begun(engine, endless("a"))
    engine.kill()
    events = [event async for event in stream]
    error = events[-1]["error"]
    assert set(error) >= {"message", "type", "param", "code"}
    assert error["message"]
    assert text_of(await engine.body(ask(SEA, max_tokens=4))), "and the pool has a fresh one"


async def test_what_runs_may_end_when_the_model_is_unloaded(engine: OneModel, entry: Entry):
    entry.skip_if_external()
    stream = await begun(engine, ask(SEA, max_tokens=12, ignore_eos=True))
    unloading = asyncio.create_task(engine.unload())
    events = [event async for event in stream]
    assert events[-1]["choices"][0]["finish_reason"] == "length"
    await unloading


async def test_an_engine_that_can_sleeps_and_wakes_in_its_process(engine: OneModel, entry: Entry):
    entry.skip_if_external()
    if not engine.config.models[MODEL].sleeps:
        pytest.skip("it can only be unloaded")
    before = text_of(await engine.body(ask(SEA, max_tokens=8)))
    if not await engine.sleep_and_wake():
        # vLLM without a GPU: it says so, and ends.
        await engine.load()
    assert text_of(await engine.body(ask(SEA, max_tokens=8))) == before
    assert "engine_died" not in engine.ledger.told[-2:]


async def test_a_load_that_fails_says_why_and_leaves_nothing(engine: OneModel, entry: Entry, folder: Path):
    entry.skip_if_external()
    await engine.unload()
    before = engine.held_mib()
    reason = await engine.fail_to_load(entry.broken(folder))
    assert len(reason) > 10
    assert str(folder) not in reason, "a client may read it"
    with pytest.raises(PoolError) as refused:
        await engine.body(ask(SEA))
    assert (refused.value.status, refused.value.code) == (503, "MODEL_UNAVAILABLE")
    assert engine.held_mib() <= before + 10
    await engine.load()
    assert text_of(await engine.body(ask(SEA, max_tokens=4))), "the next load tries again"


async def test_an_unload_returns_the_memory(engine: OneModel, entry: Entry):
    """To within a tenth of what the model took: of the processes that were started for it, since the machine has
    others, whose memory moves as well."""
    entry.skip_if_external()
    await engine.unload()
    before = engine.held_mib()
    await engine.load()
    assert text_of(await engine.body(ask(SEA, max_tokens=4)))
    loaded = engine.held_mib()
    await engine.unload()
    assert engine.held_mib() - before <= max(5, (loaded - before) / 10)


async def test_loads_leave_nothing(engine: OneModel, entry: Entry, capsys: pytest.CaptureFixture[str]):
    """Loaded and unloaded again and again in one replica: memory is back each time, and nothing else is left."""
    entry.skip_if_external()
    await engine.unload()
    before = (engine.held_mib(), engine.descriptors(), shared_memory())
    others = engine.processes()
    for number in range(LOADS):
        began = time.monotonic()
        await engine.load()
        loaded_s = time.monotonic() - began
        started = engine.processes() - others
        assert started
        assert text_of(await engine.body(ask(SEA, max_tokens=4)))
        held = engine.held_mib()
        await engine.unload()
        assert not any(map(lives, started))
        left = (engine.held_mib(), engine.descriptors(), shared_memory())
        with capsys.disabled():
            print(f"\n{number}: loaded in {loaded_s:.2f} s, {held} MiB of {len(started)} processes; left {left[:2]}")
        assert left[0] - before[0] < 20
        assert left[1] <= before[1] + 1
        assert left[2] <= before[2]


def shared_memory() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if name.startswith(SHARED)}
