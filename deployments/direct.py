"""The short way between an ingress and a replica on the same machine: a Unix socket instead of Serve's request path.

Every chunk of a stream that goes through Serve costs the two processes about a millisecond; through a socket it costs
a tenth of that. The lease has already chosen the replica, so there is nothing that Serve's router could add. A replica
on another machine, or one whose socket is not there, is reached through its Serve handle.

A call is one connection: one frame with the request, then frames with chunks, and one that ends or fails the answer.
A closed connection is a client that left. The socket belongs to the user who runs the pool (mode 0600), which is why
requests may be pickled.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import struct
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

from cluster.errors import PoolError, ReplicaGone
from cluster.ledger.events import Grant
from deployments.engines.protocol import Call

#: What a replica does with a request: `Replica.generate`.
Generate = Callable[[Grant, Call, float], AsyncGenerator[bytes, None]]

_HEAD = struct.Struct(">Ic")
_CHUNK, _FAILURE, _END = b"c", b"f", b"e"


def _frame(kind: bytes, payload: bytes = b"") -> bytes:
    return _HEAD.pack(len(payload), kind) + payload


async def _read_frame(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    size, kind = _HEAD.unpack(await reader.readexactly(_HEAD.size))
    return kind, await reader.readexactly(size)


async def call_directly(path: Path, lease: Grant, call: Call, timeout_s: float) -> AsyncGenerator[bytes, None]:
    """The answer of the replica that listens at `path`. Raises its `PoolError`, or `ReplicaGone` when it vanishes.

    Closing the generator aborts the call in the replica.
    """
    gone = ReplicaGone(f"the replica of {lease.model} went away", retry_after=1)
    try:
        reader, writer = await asyncio.open_unix_connection(str(path))
    except OSError:
        raise gone from None
    try:
        writer.write(_frame(_CHUNK, pickle.dumps((lease, call, timeout_s))))
        while True:
            kind, payload = await _read_frame(reader)
            if kind == _CHUNK:
                yield payload
            elif kind == _FAILURE:
                raise pickle.loads(payload)
            else:
                return
    except (asyncio.IncompleteReadError, ConnectionError):
        raise gone from None
    finally:
        writer.close()


class DirectServer:
    """The replica's end of the socket. `start` before the replica is announced, `stop` when its last call is over."""

    def __init__(self, path: Path, generate: Generate) -> None:
        self._path = path
        self._generate = generate
        self._server: asyncio.Server | None = None
        self._calls: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listen. Raises `OSError` where the path cannot be a socket; the Serve handle still works then."""
        # Made under another name, so that nobody connects before the mode is set.
        unready = self._path.with_suffix(".new")
        self._server = await asyncio.start_unix_server(self._serve, str(unready))
        os.chmod(unready, 0o600)
        os.rename(unready, self._path)

    async def stop(self) -> None:
        """Refuse new calls and wait for those that run; whoever stops the process bounds that wait."""
        self._path.unlink(missing_ok=True)
        if self._server is not None:
            self._server.close()
        if self._calls:
            await asyncio.wait(self._calls)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answering: asyncio.Task[None] | None = None
        try:
            _, request = await _read_frame(reader)
            lease, call, timeout_s = pickle.loads(request)
            answering = asyncio.create_task(self._answer(lease, call, timeout_s, writer))
            self._calls.add(answering)
            answering.add_done_callback(self._calls.discard)
            # A client sends nothing more: whatever comes now is its end.
            leaving = asyncio.create_task(reader.read(1))
            await asyncio.wait([answering, leaving], return_when=asyncio.FIRST_COMPLETED)
            leaving.cancel()
            answering.cancel()
            await asyncio.wait([answering, leaving])
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # A client that left before it asked.
        finally:
            writer.close()

    async def _answer(self, lease: Grant, call: Call, timeout_s: float, writer: asyncio.StreamWriter) -> None:
        end = _frame(_END)
        with contextlib.suppress(ConnectionError):
            try:
                async with contextlib.aclosing(self._generate(lease, call, timeout_s)) as chunks:
                    async for chunk in chunks:
                        writer.write(_frame(_CHUNK, chunk))
                        await writer.drain()
            except PoolError as error:
                end = _frame(_FAILURE, pickle.dumps(error))
            writer.write(end)
            await writer.drain()
