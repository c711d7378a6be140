"""The engine process's end of the link: it listens, answers leased calls, and never holds much for a slow reader.

Small chunks of a stream are joined here: the first leaves at once, later ones wait for a moment's company, the longer
the more streams run. A reader that stops reading stops the engine: its chunks are not asked for while the connection
is full.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable

import msgpack

from cluster.errors import BackendTimeout, BackendUnavailable, PoolError, ReplicaGone
from cluster.frames import BUFFER, Connection, ConnectionEnded, frame
from cluster.sockets import Listener
from deployments import link
from deployments.engines.protocol import Call, Reply
from deployments.sse import error_event

logger = logging.getLogger("slotpool.link")

#: What an engine does with a call.
Respond = Callable[[Call], Awaitable[Reply]]


class LinkServer:
    """Answers the calls for one replica. Its `listener` listens once the engine is loaded; in the end `finished`."""

    def __init__(self, model: str, replica: str, respond: Respond) -> None:
        self._model, self._replica, self._respond = model, replica, respond
        self.listener = Listener(link.REQUEST_LIMITS, self._serve)
        self._active = self._calls = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def load(self) -> tuple[int, int]:
        """How many calls run, and how many there have been."""
        return self._active, self._calls

    async def finished(self) -> None:
        """Wait until no call runs."""
        await self._idle.wait()

    async def _serve(self, connection: Connection) -> None:
        try:
            while True:
                (first, head), (second, body) = await connection.read(), await connection.read()
                if (first, second) != (link.REQUEST, link.BODY) or not await self._answer(connection, head, body):
                    break
            await connection.drain()
        except ConnectionError:
            pass  # A client that left, or that has nothing to say here.
        finally:
            connection.close()

    async def _answer(self, connection: Connection, head: bytes, body: bytes) -> bool:
        """Answer one call; whether another may follow on this connection."""
        task = asyncio.current_task()
        assert task is not None
        self._active += 1
        self._calls += 1
        self._idle.clear()
        # A client says nothing while it is answered: whatever comes in is its end.
        connection.on_input = task.cancel
        try:
            leased = link.Leased.decode(head, body)
            if leased.replica != self._replica:
                raise ReplicaGone(f"{self._model} is not served by this replica")
            await self._run(connection, leased)
        except PoolError as error:
            connection.write(frame(link.FAILURE, link.encode_failure(error)))
        except (ValueError, KeyError, TypeError):
            raise ConnectionEnded("not a request") from None
        except asyncio.CancelledError:
            if not connection.is_closed and connection.is_quiet:
                raise
            raise ConnectionEnded("the client left") from None
        finally:
            connection.on_input = None
            self._active -= 1
            if not self._active:
                self._idle.set()
        return True

    async def _run(self, connection: Connection, leased: link.Leased) -> None:
        """Drive the engine. Raises a `PoolError` where no error event can say what went wrong."""
        outbox = _Outbox(connection, self._window_s)
        try:
            async with asyncio.timeout(leased.timeout_s):
                reply = await self._respond(leased.call)
                outbox.begin(frame(link.HEAD, msgpack.packb({"status": reply.status, "headers": reply.headers})))
                async with contextlib.aclosing(reply.chunks) as chunks:
                    async for chunk in chunks:
                        await outbox.put(chunk)
            outbox.flush()
            connection.write(frame(link.END, msgpack.packb(reply.report.as_dict())))
        except (ConnectionError, asyncio.CancelledError):
            outbox.drop()
            raise
        except Exception as error:
            failure = self._as_pool_error(error)
            if not (outbox.has_sent and leased.call.stream):
                outbox.drop()
                raise failure from None
            outbox.flush()
            connection.write(_chunk_frames(error_event(failure)) + frame(link.END, msgpack.packb({})))

    def _window_s(self) -> float:
        """How long to collect a stream's chunks: nothing while it is alone, up to 0.1 s when many share the replica.

        Every chunk that leaves costs the same whatever it carries, so the rate of chunks is what a busy pool saves: on
        two cores that also decode, 8 streams made 140 tokens/s with a window of 88 ms and 127 with one of 28.
        """
        return min(0.1, 0.025 * (self._active - 1))

    def _as_pool_error(self, error: Exception) -> PoolError:
        if isinstance(error, PoolError):
            return error
        if isinstance(error, TimeoutError):
            return BackendTimeout("the request ran longer than it may", phase="running")
        logger.error("%s failed", self._model, exc_info=error)
        return BackendUnavailable(f"the engine of {self._model} failed: {type(error).__name__}")


class _Outbox:
    """Joins the chunks of one answer: at most one frame per window after the first, and a bounded amount held."""

    def __init__(self, connection: Connection, window_s: Callable[[], float]) -> None:
        self._connection, self._window_s = connection, window_s
        self._loop = asyncio.get_running_loop()
        self._head = b""
        self._held: list[bytes] = []
        self._size = 0
        self._next_at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self.has_sent = False

    def begin(self, head: bytes) -> None:
        """The answer's head leaves with its first chunk, or its end."""
        self._head = head

    async def put(self, chunk: bytes) -> None:
        """Send a chunk, now or with the next ones. Waits for a reader that is slow."""
        self._held.append(chunk)
        self._size += len(chunk)
        if self._size >= BUFFER:
            self.flush()
        elif self._timer is None:
            wait_s = self._next_at - self._loop.time()
            if wait_s > 0:
                self._timer = self._loop.call_later(wait_s, self.flush)
            else:
                self.flush()
        if self._connection.is_full:
            await self._connection.drain()

    def flush(self) -> None:
        """Send what is held."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        data, self._head = self._head, b""
        if self._held:
            data += _chunk_frames(b"".join(self._held))
            self._held.clear()
            self._size = 0
            self._next_at = self._loop.time() + self._window_s()
            self.has_sent = True
        if data:
            self._connection.write(data)

    def drop(self) -> None:
        """Send nothing more."""
        self._held.clear()
        self._head = b""
        self.flush()


def _chunk_frames(data: bytes) -> bytes:
    if len(data) <= link.MAX_CHUNK:
        return frame(link.CHUNK, data)
    parts = range(0, len(data), link.MAX_CHUNK)
    return b"".join(frame(link.CHUNK, data[start : start + link.MAX_CHUNK]) for start in parts)
