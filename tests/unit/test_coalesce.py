"""Coalescing: nothing lost, nothing reordered, first chunk at once, errors after what came before them."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from deployments.coalesce import HELD, coalesce


async def source(parts, closed=None):
    try:
        for part in parts:
            if isinstance(part, Exception):
                raise part
            if part is None:
                await asyncio.Event().wait()
            yield part
            await asyncio.sleep(0)
    finally:
        if closed is not None:
            closed.append(True)


async def test_bytes_come_in_order_and_few_items():
    parts = [f"{index} ".encode() for index in range(100)]
    items = [item async for item in coalesce(source(parts), lambda: 0.02, 10)]
    assert b"".join(items) == b"".join(parts)
    assert items[0] == b"0 "
    assert len(items) < 10


async def test_without_a_window_nothing_waits():
    items = [item async for item in coalesce(source([b"a", b"b"]), lambda: 0, 10)]
    assert b"".join(items) == b"ab"


async def test_an_error_comes_after_the_bytes_before_it():
    seen = []
    with pytest.raises(ValueError, match="boom"):
        async for item in coalesce(source([b"a", b"b", ValueError("boom")]), lambda: 0.01, 10):
            seen.append(item)
    assert b"".join(seen) == b"ab"


async def test_a_silent_source_times_out():
    with pytest.raises(TimeoutError):
        async for _ in coalesce(source([b"a", None]), lambda: 0, 0.05):
            pass


async def test_a_timer_that_comes_too_early_counts(monkeypatch):
    """Found as a stream that hung for ever: uvloop fires timers up to a millisecond before loop.time() says so."""
    loop = asyncio.get_running_loop()
    at, later = loop.call_at, loop.call_later
    monkeypatch.setattr(loop, "call_at", lambda when, *rest, **kw: at(when - 0.02, *rest, **kw))
    monkeypatch.setattr(loop, "call_later", lambda delay, *rest, **kw: later(max(0, delay - 0.02), *rest, **kw))

    async def drain():
        async for _ in coalesce(source([b"a", None]), lambda: 0, 0.05):
            pass

    draining = asyncio.ensure_future(drain())
    done, _ = await asyncio.wait([draining], timeout=2)
    draining.cancel()
    assert done, "it hangs"
    assert isinstance(draining.exception(), TimeoutError)


@pytest.mark.parametrize("parts", [[b"a", None], [None]])
async def test_closing_closes_the_source(parts):
    closed: list[bool] = []
    async with aclosing(coalesce(source(parts, closed), lambda: 0, 10)) as chunks:
        if parts[0]:
            await anext(chunks)
        else:
            waiting = asyncio.ensure_future(anext(chunks))
            await asyncio.sleep(0.01)
            waiting.cancel()
            await asyncio.wait([waiting])
    assert closed == [True]


async def test_an_empty_source_is_an_empty_stream():
    assert [item async for item in coalesce(source([]), lambda: 1, 10)] == []


async def test_a_source_runs_only_so_far_ahead_of_a_reader_that_stopped():
    sent = 0

    async def endless():
        nonlocal sent
        while True:
            sent += 1000
            yield b"x" * 1000
            await asyncio.sleep(0)

    async with aclosing(coalesce(endless(), lambda: 0, 10)) as chunks:
        await anext(chunks)
        for _ in range(1000):
            await asyncio.sleep(0)
        assert sent <= HELD + 3000
        seen = sent
        await anext(chunks)
        for _ in range(10):
            await asyncio.sleep(0)
        assert sent > seen


async def test_the_time_is_over_for_a_reader_that_stopped_as_well():
    closed: list[bool] = []
    async with aclosing(coalesce(source([b"a"] * 9 + [None], closed), lambda: 0, 0.05)) as chunks:
        await anext(chunks)
        while not closed:
            await asyncio.sleep(0.01)
        with pytest.raises(TimeoutError):
            while True:
                await anext(chunks)
