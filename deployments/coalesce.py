"""Joins the small chunks of a stream: the first leaves at once, later ones wait for a moment's company."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable

#: How much of a stream waits here for a slow reader, in bytes; then its source is not asked for more.
HELD = 64 * 1024


async def coalesce(
    chunks: AsyncIterator[bytes], window_s: Callable[[], float], timeout_s: float
) -> AsyncGenerator[bytes, None]:
    """Yield the bytes of `chunks` in order, at most one item per `window_s()` seconds after the first.

    The source runs at its own speed in a task, so that a chunk never waits for the one after it, but no more than
    `HELD` ahead of the reader. An error of the source is raised after everything before it was yielded;
    `TimeoutError` when the source has not ended after `timeout_s`: it is ended then, whether anybody reads or not.
    Closing this generator closes the source.
    """
    ready: list[bytes] = []
    held = 0
    news, room = asyncio.Event(), asyncio.Event()
    expired = False

    async def pump() -> None:
        nonlocal held
        try:
            async for chunk in chunks:
                ready.append(chunk)
                held += len(chunk)
                news.set()
                if held >= HELD:
                    room.clear()
                    await room.wait()
        finally:
            news.set()
            await _close(chunks)

    def expire() -> None:
        nonlocal expired
        expired = True
        source.cancel()

    loop = asyncio.get_running_loop()
    source = asyncio.create_task(pump())
    # A timer and not asyncio.timeout(): that would cancel whoever iterates over this generator, at any place. And a
    # flag, not a look at the clock: uvloop's timers may come a moment before their time.
    alarm = loop.call_later(timeout_s, expire)
    next_at = 0.0
    try:
        while True:
            await news.wait()
            wait_s = next_at - loop.time()
            if wait_s > 0 and held < HELD and not source.done():
                # The end of the source cuts the window short.
                await asyncio.wait([source], timeout=wait_s)
            news.clear()
            if ready:
                batch = b"".join(ready)
                ready.clear()
                held = 0
                room.set()
                next_at = loop.time() + window_s()
                yield batch
            elif source.done():
                if expired:
                    raise TimeoutError
                source.result()
                return
            if source.done():
                news.set()
    finally:
        alarm.cancel()
        source.cancel()
        await asyncio.wait([source])
        # Once more, for a source that was never begun.
        await _close(chunks)


async def _close(chunks: AsyncIterator[bytes]) -> None:
    if isinstance(chunks, AsyncGenerator):
        await chunks.aclose()
