"""The link between an ingress and an engine process: what the frames of one call say, and the caller's end.

    q  the request (msgpack): which replica and lease it is for, how long it may run, and the call without its body
    b  the call's body: JSON, or raw bytes
    h  the answer's head (msgpack): status and headers
    c  a chunk of the answer's body
    e  its end (msgpack): the engine's report
    f  its failure (msgpack): the fields of a `PoolError`, rebuilt by its name in `cluster.errors`

A connection carries one call at a time and is kept for the next one after a clean end. Closing it aborts its call.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import msgpack

from cluster import errors
from cluster.errors import PoolError, ReplicaGone
from cluster.frames import Connection, frame
from cluster.orders import Address
from cluster.sockets import connect
from deployments.engines.protocol import Call, Report
from deployments.sse import DONE

logger = logging.getLogger("slotpool.link")

REQUEST, BODY, HEAD, CHUNK, END, FAILURE = b"q", b"b", b"h", b"c", b"e", b"f"

#: The largest payloads, in bytes. A body is as large as the pool's `max_body_mb` lets it be, which Serve bounds at
#: one GiB; a chunk that is larger comes in parts.
MAX_CHUNK = 2**20
REQUEST_LIMITS = {REQUEST: 2**20, BODY: 2**30}
ANSWER_LIMITS = {HEAD: 2**20, CHUNK: MAX_CHUNK, END: 2**20, FAILURE: 2**20}

#: An engine's report follows its last word within this time, in seconds, or is not waited for.
REPORT_S = 0.2
#: A connection that nobody uses is closed after this time, in seconds, and so many are kept for each engine.
IDLE_S = 30.0
MAX_IDLE = 512


@dataclass(frozen=True, slots=True)
class Leased:
    """One call with the lease it runs on. `timeout_s` bounds the run in the engine process."""

    replica: str
    request: str
    generation: int
    timeout_s: float
    call: Call

    def encode(self) -> tuple[bytes, bytes]:
        """The payloads of its request and its body."""
        raw = isinstance(self.call.body, bytes)
        head = {
            "replica": self.replica,
            "request": self.request,
            "generation": self.generation,
            "timeout_s": self.timeout_s,
            "call": self.call.head(),
            "raw": raw,
        }
        body = self.call.body if isinstance(self.call.body, bytes) else _json(self.call.body)
        return msgpack.packb(head), body

    @classmethod
    def decode(cls, head: bytes, body: bytes) -> Leased:
        """The call again. Raises `ValueError`, `KeyError` or `TypeError` when the bytes are not one."""
        said = msgpack.unpackb(head)
        call = Call.of(said["call"], body if said["raw"] else json.loads(body))
        return cls(said["replica"], said["request"], said["generation"], float(said["timeout_s"]), call)


def encode_failure(error: PoolError) -> bytes:
    """The payload of a failure."""
    known = next(kind for kind in type(error).__mro__ if getattr(errors, kind.__name__, None) is kind)
    said = {
        "kind": known.__name__,
        "message": error.message,
        "param": error.param,
        "code": error.code,
        "status": error.status,
        "retry_after": error.retry_after,
        "extras": error.extras,
    }
    return msgpack.packb(said, default=str)  # type: ignore[no-any-return]


def decode_failure(payload: bytes) -> PoolError:
    """The error that a failure stands for; one that nobody knows is a plain `PoolError`."""
    said = msgpack.unpackb(payload)
    kind = getattr(errors, said["kind"], None)
    if not (isinstance(kind, type) and issubclass(kind, PoolError)):
        kind = PoolError
    return kind(
        said["message"],
        param=said["param"],
        code=said["code"],
        status=said["status"],
        retry_after=said["retry_after"],
        **said["extras"],
    )


@dataclass(slots=True)
class Answer:
    """What comes back for one call, from frames on whatever way. `begin`, then `chunks` once."""

    frames: AsyncIterator[tuple[bytes, bytes]]
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    report: Report | None = None

    async def begin(self) -> None:
        """Wait for status and headers. Raises the engine's refusal, or what ended the connection."""
        kind, payload = await anext(self.frames)
        if kind == FAILURE:
            raise decode_failure(payload)
        head = msgpack.unpackb(payload)
        self.status, self.headers = head["status"], head["headers"]

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The body. Raises the engine's failure; the report is there when it has ended.

        Whoever leaves a stream behind its last word leaves a whole answer: its report is taken nevertheless.
        """
        async for kind, payload in self.frames:
            if kind == CHUNK:
                try:
                    yield payload
                except GeneratorExit:
                    if payload.endswith(DONE):
                        await self._take_report()
                    raise
            elif kind == FAILURE:
                raise decode_failure(payload)
            else:
                self.report = Report.from_dict(msgpack.unpackb(payload))
                return

    async def _take_report(self) -> None:
        with contextlib.suppress(OSError, StopAsyncIteration):
            async with asyncio.timeout(REPORT_S):
                kind, payload = await anext(self.frames)
                if kind == END:
                    self.report = Report.from_dict(msgpack.unpackb(payload))


class LinkCall:
    """One call on its way over one connection. `close` always; a call that had its end leaves the connection open."""

    def __init__(self, links: Links, key: str, connection: Connection) -> None:
        self._links, self._key, self._connection = links, key, connection
        self._is_over = False

    @property
    def is_waiting(self) -> bool:
        """Whether somebody waits for the next frame."""
        return self._connection.is_read

    def fail(self, error: Exception) -> None:
        """Give up on the engine: whoever reads gets `error` at once."""
        self._connection.fail(error)

    def __aiter__(self) -> LinkCall:
        return self

    async def __anext__(self) -> tuple[bytes, bytes]:
        """The answer's next frame, up to its end or failure. Raises `ConnectionEnded`, or what `fail` was given."""
        if self._is_over:
            raise StopAsyncIteration
        kind, payload = await self._connection.read()
        self._is_over = kind in (END, FAILURE)
        return kind, payload

    def close(self) -> None:
        """Abort the call if it runs."""
        if self._is_over and self._connection.is_quiet and not self._connection.is_closed:
            self._links.keep(self._key, self._connection)
        else:
            self._connection.fail(ReplicaGone("the call was given up"))


class Links:
    """The connections of one process to engine processes. Its methods belong on one event loop."""

    def __init__(self, node: str) -> None:
        self._node = node
        self._idle: dict[str, list[tuple[float, Connection]]] = {}
        self._sweeping: asyncio.TimerHandle | None = None

    def reaches(self, address: Address) -> bool:
        """Whether there is a way to that engine from this node."""
        return address.node == self._node or bool(address.port)

    async def call(self, address: Address, leased: Leased) -> LinkCall:
        """Send a call to the engine that listens there. Raises `OSError` if none does."""
        return await self.send(address, *leased.encode())

    async def send(self, address: Address, head: bytes, body: bytes) -> LinkCall:
        """Send a call whose request and body are encoded already."""
        key = address.unix if address.node == self._node else f"{address.host}:{address.port}"
        connection = self._take(key) or await connect(address, self._node, ANSWER_LIMITS)
        call = LinkCall(self, key, connection)
        try:
            connection.write(frame(REQUEST, head) + frame(BODY, body))
            await connection.drain()
        except BaseException:
            call.close()
            raise
        return call

    def keep(self, key: str, connection: Connection) -> None:
        """Take a connection back for the next call."""
        idle = self._idle.setdefault(key, [])
        if len(idle) >= MAX_IDLE:
            connection.close()
            return
        idle.append((time.monotonic(), connection))
        if self._sweeping is None:
            self._sweeping = asyncio.get_running_loop().call_later(IDLE_S, self._sweep)

    def close(self) -> None:
        """Close all that is idle."""
        if self._sweeping is not None:
            self._sweeping.cancel()
        for idle in self._idle.values():
            for _, connection in idle:
                connection.close()
        self._idle.clear()

    def _take(self, key: str) -> Connection | None:
        idle = self._idle.get(key)
        while idle:
            _, connection = idle.pop()
            if not connection.is_closed:
                return connection
        return None

    def _sweep(self) -> None:
        oldest = time.monotonic() - IDLE_S
        for key, idle in list(self._idle.items()):
            for since, connection in idle:
                if since <= oldest:
                    connection.close()
            kept = [each for each in idle if each[0] > oldest and not each[1].is_closed]
            if kept:
                self._idle[key] = kept
            else:
                del self._idle[key]
        self._sweeping = asyncio.get_running_loop().call_later(IDLE_S, self._sweep) if self._idle else None


def _json(body: Any) -> bytes:
    return json.dumps(body, separators=(",", ":")).encode()
