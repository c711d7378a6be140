"""Frames on a stream socket: what the link and the control channel of an engine process are made of.

A frame is its payload's length, one byte that says what it is, and the payload. There is no pickle: whatever comes in
is bytes, msgpack or JSON. Every buffer is bounded: a sender is told to wait, a reader stops reading, and a frame that
is larger than its kind may be ends the connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
import stat
import struct
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

#: How much of what came in waits to be read, and how much of what goes out waits in this process, in bytes.
BUFFER = 64 * 1024
#: Connections that may wait to be accepted. The kernel's own limit (`somaxconn`) is 4096 since Linux 5.4.
BACKLOG = 4096

_HEAD = struct.Struct(">Ic")
_CREDENTIALS = struct.Struct("3i")


def frame(kind: bytes, payload: bytes = b"") -> bytes:
    """One frame, ready to be written."""
    return _HEAD.pack(len(payload), kind) + payload


#: Kinds of frames, and the largest payload of each, in bytes.
Limits = Mapping[bytes, int]


class ConnectionEnded(ConnectionError):
    """The other end is gone, or was cut off for what it sent."""


class Connection(asyncio.Protocol):
    """One end of a connection that carries frames. One task reads, and one writes.

    `limits` names the kinds of frames that may come in, with the largest payload of each. With a `gate`, the first
    frame goes there and not to `read`: it returns the limits that hold from then on, or None to end the connection.
    With `own_user_only`, a Unix socket with another user at its other end is closed before anything is read or sent.
    `on_input` is called when anything comes in or the connection ends, in addition to what `read` returns.
    """

    def __init__(
        self, limits: Limits, gate: Callable[[bytes], Limits | None] | None = None, *, own_user_only: bool = False
    ) -> None:
        self._limits = limits
        self._gate = gate
        self._own_user_only = own_user_only
        self.on_input: Callable[[], object] | None = None
        self._transport: asyncio.Transport | None = None
        self._frames: deque[tuple[bytes, bytes]] = deque()
        self._held = 0
        self._partial = bytearray()
        self._reading: asyncio.Future[None] | None = None
        self._draining: asyncio.Future[None] | None = None
        self._is_reading_paused = self._is_writing_paused = self._is_finished = False
        self._failure: Exception | None = None

    # --- what asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Not a check: those of uvloop are not of asyncio's class.
        self._transport = transport = cast(asyncio.Transport, transport)
        transport.set_write_buffer_limits(high=BUFFER)
        if self._own_user_only and user_of(transport.get_extra_info("socket")) != os.geteuid():
            self.fail(ConnectionEnded("another user is at the other end of the pool's socket"))

    def data_received(self, data: bytes) -> None:
        if self._partial:
            self._partial += data
            source: bytes | bytearray = self._partial
        else:
            source = data
        end, size = 0, len(source)
        while size - end >= _HEAD.size:
            length, kind = _HEAD.unpack_from(source, end)
            stop = end + _HEAD.size + length
            if length > self._limits.get(kind, -1):
                self.fail(ConnectionEnded("a frame that may not be sent here"))
                return
            if stop > size:
                break
            payload = bytes(source[end + _HEAD.size : stop])
            end = stop
            if self._gate is not None:
                if not self._pass_gate(payload):
                    return
                continue
            self._frames.append((kind, payload))
            self._held += length
        if source is self._partial:
            del self._partial[:end]
        elif end < size:
            self._partial += source[end:]
        if self._held > BUFFER and not self._is_reading_paused and self._transport is not None:
            self._is_reading_paused = True
            self._transport.pause_reading()
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._failure is None:
            self._failure = ConnectionEnded("the other end is gone")
        self.resume_writing()
        self._wake()

    def pause_writing(self) -> None:
        self._is_writing_paused = True

    def resume_writing(self) -> None:
        self._is_writing_paused = False
        if self._draining is not None and not self._draining.done():
            self._draining.set_result(None)

    # --- what its owner calls

    @property
    def is_closed(self) -> bool:
        return self._failure is not None or self._transport is None

    @property
    def is_waiting_at_gate(self) -> bool:
        """Whether the first frame has not come."""
        return self._gate is not None

    @property
    def is_quiet(self) -> bool:
        """Whether nothing has come in that was not read."""
        return not (self._frames or self._partial)

    @property
    def is_read(self) -> bool:
        """Whether somebody waits for the next frame."""
        return self._reading is not None

    @property
    def is_full(self) -> bool:
        """Whether a writer should wait in `drain`."""
        return self._is_writing_paused

    async def read(self) -> tuple[bytes, bytes]:
        """The next frame. Raises what `fail` was given, or `ConnectionEnded`, once all that had come is read."""
        while not self._frames:
            if self._failure is not None:
                raise self._failure
            self._reading = asyncio.get_running_loop().create_future()
            try:
                await self._reading
            finally:
                self._reading = None
        kind, payload = self._frames.popleft()
        self._held -= len(payload)
        if self._is_reading_paused and self._held < BUFFER // 2 and self._transport is not None:
            self._is_reading_paused = False
            self._transport.resume_reading()
        return kind, payload

    def write(self, data: bytes) -> None:
        """Send frames; on a connection that has ended, or after `finish_writing`, nothing."""
        if self._transport is not None and self._failure is None and not self._is_finished:
            self._transport.write(data)

    async def drain(self) -> None:
        """Wait until little of what was written is still in this process. Raises as `read` does."""
        while self._is_writing_paused and self._failure is None:
            self._draining = asyncio.get_running_loop().create_future()
            try:
                await self._draining
            finally:
                self._draining = None
        if self._failure is not None:
            raise self._failure

    def finish_writing(self) -> None:
        """Tell the other end that nothing more will come."""
        if self._transport is not None and not self._is_finished:
            self._is_finished = True
            self._transport.write_eof()

    def close(self) -> None:
        """End the connection once all that was written is sent."""
        if self._transport is not None:
            self._transport.close()

    def fail(self, error: Exception) -> None:
        """End the connection at once; whoever reads or writes gets `error`, and nothing of what had come in."""
        if self._failure is None:
            self._failure = error
        self._frames.clear()
        self._held = 0
        self._partial.clear()
        if self._transport is not None:
            self._transport.abort()
        self.resume_writing()
        self._wake()

    def _pass_gate(self, payload: bytes) -> bool:
        assert self._gate is not None
        limits = self._gate(payload)
        self._gate = None
        if limits is None:
            self.fail(ConnectionEnded("a stranger"))
            return False
        self._limits = limits
        return True

    def _wake(self) -> None:
        if self._reading is not None and not self._reading.done():
            self._reading.set_result(None)
        if self.on_input is not None:
            self.on_input()


def user_of(unix_socket: socket.socket) -> int:
    """The user whose process is at the other end of a connected Unix socket."""
    credentials = unix_socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(credentials)[1])


def check_private(folder: Path) -> None:
    """Raises `PermissionError` unless the folder is this user's own and closed to all others."""
    seen = os.lstat(folder)
    if not stat.S_ISDIR(seen.st_mode) or seen.st_uid != os.geteuid() or stat.S_IMODE(seen.st_mode) & 0o077:
        raise PermissionError("the folder of the pool's sockets is not this user's own, or is open to others")


def make_private(folder: Path) -> Path:
    """The folder, made with mode 0700 where it is not there. Raises `PermissionError` where it is somebody else's."""
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    check_private(folder)
    return folder


def raise_file_limit() -> None:
    """Let this process have as many connections as its user may have open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
