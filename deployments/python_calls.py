"""Calls from Python instead of HTTP: bodies in, objects out, and failures raised as the errors they are."""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import AsyncGenerator, Iterator
from typing import Any

from cluster import errors
from deployments.gateway import Gateway
from deployments.requests import parse_request


async def whole(gateway: Gateway, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The answer to a body of one of the OpenAI routes. Raises the `PoolError` that HTTP would have answered."""
    request, checked = parse_request(gateway.config, path, {**body, "stream": False}, request_id=uuid.uuid4().hex)
    return await joined(gateway.stream(request, checked))


def streamed(gateway: Gateway, path: str, body: dict[str, Any]) -> AsyncGenerator[bytes, None]:
    """The parts of a streamed answer, for `events_of`. Raises the `PoolError` that HTTP would have answered."""
    request, checked = parse_request(gateway.config, path, {**body, "stream": True}, request_id=uuid.uuid4().hex)
    return gateway.stream(request, checked)


async def joined(chunks: AsyncGenerator[bytes, None]) -> dict[str, Any]:
    """The object of an answer in one body."""
    async with contextlib.aclosing(chunks):
        return json.loads(b"".join([chunk async for chunk in chunks]))  # type: ignore[no-any-return]


def events_of(chunk: bytes) -> Iterator[dict[str, Any]]:
    """The objects in one part of a streamed answer, without comments. Raises the `PoolError` that ended the stream."""
    for event in chunk.split(b"\n\n"):
        if event.startswith(b"data: {"):
            said = json.loads(event[6:])
            if "error" in said:
                raise _failure(said["error"])
            yield said


def _failure(error: dict[str, Any]) -> errors.PoolError:
    """A stream's last event as the error of its code; its status is gone by then, as in HTTP."""
    return errors.BackendUnavailable(error["message"], code=error["code"])
