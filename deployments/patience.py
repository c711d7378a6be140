"""Requests that wait for as long as their client stays, as Ollama's do: a full queue, or a wait that has become too
long, sends nobody away. The request asks again, and its stream goes on with signs of life.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable

from cluster import errors
from deployments.run_info import RunInfo
from deployments.sse import comment, error_event, is_comment

#: Pause before a request that was sent away asks again, in seconds. Asking costs a millisecond.
PAUSE_S = 1.0
#: A stream that waits has a sign of life this often, in seconds.
SIGN_S = 4.0


async def patient(
    ask: Callable[[], AsyncGenerator[bytes, None]], info: RunInfo, *, streams: bool
) -> AsyncGenerator[bytes, None]:
    """The answer that `ask` gives, which is asked again for as long as the request is sent away before it ran."""
    signed_at: float | None = None
    while True:
        has_begun = False
        failure: errors.PoolError | None = None
        try:
            async with contextlib.aclosing(ask()) as chunks:
                async for chunk in chunks:
                    if not has_begun and sends_away(info.failure):
                        failure = info.failure
                        break
                    if is_comment(chunk):
                        signed_at = time.monotonic()
                    else:
                        has_begun = True
                    yield chunk
                else:
                    return
        except errors.PoolError as error:
            failure = error
        assert failure is not None, "the stream went on or failed"
        if not sends_away(failure):
            if signed_at is None:
                raise failure
            info.failure = failure
            yield error_event(failure)
            return
        info.failure = None
        await asyncio.sleep(PAUSE_S)
        # It has as much time as at first: what it may take to run, it has not taken.
        info.arrived = time.monotonic()
        if streams and info.arrived - (signed_at or 0.0) >= SIGN_S:
            signed_at = info.arrived
            yield comment("queued")


def sends_away(error: errors.PoolError | None) -> bool:
    """Whether a request was told to come back later, and has not begun to run."""
    if isinstance(error, errors.BackendTimeout):
        return error.extras.get("phase") == "queued"
    return isinstance(error, errors.QueueFull)
