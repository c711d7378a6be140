"""Requests that wait for as long as their client stays, as Ollama's do: a full queue, or a wait that has become too
long, sends nobody away. The request asks again, and its stream goes on with signs of life.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator
from typing import Any

from cluster import errors
from cluster.request import Request
from deployments.gateway import KEEP_ALIVE_S, Gateway
from deployments.run_info import RunInfo
from deployments.sse import comment, error_event, is_comment

#: Pause before a request that was sent away asks again, in seconds. Asking costs a millisecond.
PAUSE_S = 1.0


async def patient_stream(
    gateway: Gateway, request: Request, body: dict[str, Any], info: RunInfo
) -> AsyncGenerator[bytes, None]:
    """As `Gateway.stream`, of a request that is not sent away, unless it has a deadline of its own."""
    signed_at: float | None = None
    while True:
        has_begun = False
        failure: errors.PoolError | None = None
        try:
            async with contextlib.aclosing(gateway.stream(request, body, info)) as chunks:
                async for chunk in chunks:
                    if not has_begun and _sends_away(info.failure) and not has_deadline(gateway, request):
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
        if not _sends_away(failure) or has_deadline(gateway, request):
            if signed_at is None:
                raise failure
            info.failure = failure
            yield error_event(failure)
            return
        info.failure = None
        await asyncio.sleep(PAUSE_S)
        # It has as much time as at first: what it may take to run, it has not taken.
        info.arrived = time.monotonic()
        if body.get("stream") and time.monotonic() - (signed_at or 0.0) >= KEEP_ALIVE_S - PAUSE_S:
            signed_at = time.monotonic()
            yield comment("queued")


async def patient_touch(gateway: Gateway, request: Request) -> None:
    """As `Gateway.touch`, likewise."""
    while True:
        try:
            return await gateway.touch(request)
        except errors.PoolError as error:
            if not _sends_away(error) or has_deadline(gateway, request):
                raise
        await asyncio.sleep(PAUSE_S)


def has_deadline(gateway: Gateway, request: Request) -> bool:
    """Whether the client said itself how long it will wait."""
    return request.timeout_s < gateway.config.request_timeout_s(request.model)


def _sends_away(error: errors.PoolError | None) -> bool:
    """Whether a request was told to come back later, and has not begun to run."""
    if isinstance(error, errors.BackendTimeout):
        return error.extras.get("phase") == "queued"
    return isinstance(error, errors.QueueFull)
