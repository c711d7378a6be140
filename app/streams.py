"""Streams as HTTP answers: sent as plain ASGI, with a rhythm for the events of one that waits."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.requests import HTTPConnection
from starlette.types import Receive, Scope, Send

#: A stream that waits has an event that clients parse at its first sign of life and then this often, in seconds.
EVENT_S = 15.0
#: A sign that comes so much too early is late enough, in seconds: the next one would be much too late.
MARGIN_S = 1.0


class Stream(StreamingResponse):
    """The rest of a stream whose first chunk is there already.

    `source` is closed at the end, however that comes; `rest` is what is sent of it, by default all.
    """

    def __init__(
        self,
        first: bytes,
        source: AsyncGenerator[Any, None],
        *,
        rest: AsyncGenerator[bytes, None] | None = None,
        media_type: str = "text/event-stream",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        rest = source if rest is None else rest
        super().__init__(rest, media_type=media_type, headers={"Cache-Control": "no-store", **(headers or {})})
        self._first = first
        self._source, self._rest = source, rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Plain ASGI: Serve cancels this call when the client has left, so no task need listen for that. Closed here
        # and not in a generator around it, which would never run if the client left before its first turn.
        async with contextlib.aclosing(self._source):
            await send_on(send, self.status_code, self.raw_headers, self._first, self._rest)


async def send_on(
    send: Send, status: int, headers: list[tuple[bytes, bytes]], first: bytes, rest: AsyncGenerator[bytes, None]
) -> None:
    """Send an answer whose first part is there already, and close the rest, however that ends."""
    async with contextlib.aclosing(rest):
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": first, "more_body": True})
        async for chunk in rest:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class Rhythm:
    """When a stream that waits needs the next event that its client parses. The first was sent when it was made."""

    def __init__(self) -> None:
        self._due_at = time.monotonic() + EVENT_S - MARGIN_S

    def is_due(self) -> bool:
        """Whether it is time for one; if so, it counts as sent."""
        now = time.monotonic()
        if now < self._due_at:
            return False
        self._due_at = now + EVENT_S - MARGIN_S
        return True


def request_id_of(request: HTTPConnection) -> str:
    """The request's id. Serve makes one where the client sent none, and puts it on every answer itself."""
    return request.headers.get("x-request-id") or uuid.uuid4().hex
