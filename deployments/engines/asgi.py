"""Calls an ASGI application in this process, as an HTTP server would: for engines that bring a web application along.

A caller that closes the answer is to the application a client that has left, and it has a moment to tidy up. What the
application sends is taken no faster than it is read.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from cluster.errors import BackendUnavailable

logger = logging.getLogger("slotpool.engine")

Message = MutableMapping[str, Any]
Application = Callable[
    [Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]
]

#: How long an application may take to notice that its client has left, in seconds, before it is cancelled.
LEAVE_S = 2.0
#: How many parts of an answer wait for their reader.
MAX_UNREAD = 4


@dataclass(frozen=True, slots=True)
class Head:
    """How an answer begins; the names of headers are in lower case."""

    status: int
    headers: dict[str, str]


async def answer(
    application: Application, method: str, path: str, query: str, headers: dict[str, str], body: bytes
) -> AsyncGenerator[Head | bytes, None]:
    """The head of the application's answer, and then its parts as they come. Closing it ends the application's work.

    Raises `BackendUnavailable` when the application fails before its answer is whole.
    """
    sent: asyncio.Queue[Message | None] = asyncio.Queue(MAX_UNREAD)
    left = asyncio.Event()
    running = asyncio.create_task(
        _run(application, _scope(method, path, query, headers), _receiver(body, left), sent, left)
    )
    try:
        while (message := await sent.get()) is not None:
            if message["type"] == "http.response.start":
                named = message.get("headers", ())
                yield Head(
                    message["status"], {name.decode("latin-1"): value.decode("latin-1") for name, value in named}
                )
                continue
            if part := message.get("body"):
                yield part
            if not message.get("more_body"):
                return
        raise BackendUnavailable("the engine broke off its answer")
    finally:
        left.set()
        while not sent.empty():
            # Whoever waits to send more may go on, to its end.
            sent.get_nowait()
        await asyncio.wait([running], timeout=LEAVE_S)
        running.cancel()


def _scope(method: str, path: str, query: str, headers: dict[str, str]) -> Message:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode("latin-1"),
        "root_path": "",
        "headers": [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()],
        "client": None,
        "server": None,
        "state": {},
    }


def _receiver(body: bytes, left: asyncio.Event) -> Callable[[], Awaitable[Message]]:
    """What the application reads: the whole body at once, and that the client has left when it has."""
    unread = [body]

    async def receive() -> Message:
        if unread:
            return {"type": "http.request", "body": unread.pop(), "more_body": False}
        await left.wait()
        return {"type": "http.disconnect"}

    return receive


async def _run(
    application: Application,
    scope: Message,
    receive: Callable[[], Awaitable[Message]],
    sent: asyncio.Queue[Message | None],
    left: asyncio.Event,
) -> None:
    async def send(message: Message | None) -> None:
        if not left.is_set():
            await sent.put(message)

    try:
        await application(scope, receive, send)
    except Exception:
        logger.exception("%s %s failed", scope["method"], scope["path"])
    await send(None)
