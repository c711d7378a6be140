"""Joins the small chunks of a stream: the first leaves at once, later ones wait for a moment's company."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable


async def coalesce(
    chunks: AsyncIterator[bytes], window_s: Callable[[], float], timeout_s: float
) -> AsyncGenerator[bytes, None]:
    """Yield the bytes of `chunks` in order, at most one item per `window_s()` seconds after the first.

    The source runs at its own speed in a task, so that a chunk never waits for the one after it. An error of the
    source is raised after everything before it was yielded; `TimeoutError` when the source has not ended after
    `timeout_s`. Closing this generator closes the source.
    """
    ready: list[bytes] = []
    news = asyncio.Event()
    expired = False

    async def pump() -> None:
        try:
            async for chunk in chunks:
                ready.append(chunk)
                news.set()
        finally:
            news.set()

    def expire() -> None:
        nonlocal expired
        expired = True
        news.set()

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
            if wait_s > 0 and not source.done():
                # The end of the source cuts the window short.
                await asyncio.wait([source], timeout=wait_s)
            news.clear()
            if ready:
                batch = b"".join(ready)
                ready.clear()
                next_at = loop.time() + window_s()
                yield batch
            elif source.done():
                source.result()
                return
            if source.done():
                news.set()
            elif expired:
                raise TimeoutError
    finally:
        alarm.cancel()
        source.cancel()
        await asyncio.wait([source])
        if isinstance(chunks, AsyncGenerator):
            await chunks.aclose()
