"""Connections between the pool's processes: a Unix socket on one machine, TCP with a token between two.

A Unix socket is believed only in a folder of our own and with our own user at the other end. A TCP connection opens
with a frame that holds the token of the address.
"""

from __future__ import annotations

import asyncio
import hmac
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

from cluster.frames import BACKLOG, Connection, ConnectionEnded, Limits, check_private, frame
from cluster.orders import Address

TOKEN = b"a"
TOKEN_LIMITS = {TOKEN: 256}
#: A TCP connection must open with its token within this time, in seconds.
TOKEN_S = 5.0
#: A process accepts a connection within this time, in seconds, or is taken to be away.
CONNECT_S = 5.0


def free_port() -> int:
    """A TCP port of the loopback interface on which nobody listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def connect(address: Address, node: str, limits: Limits) -> Connection:
    """A connection from a process on `node` to who listens there. Raises `OSError` if nobody does."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(CONNECT_S):
        if address.node != node:
            _, connection = await loop.create_connection(lambda: Connection(limits), address.host, address.port)
            connection.write(frame(TOKEN, address.token.encode()))
            return connection
        check_private(Path(address.unix).parent)
        _, connection = await loop.create_unix_connection(lambda: Connection(limits, own_user_only=True), address.unix)
        return connection


class Listener:
    """Accepts connections and gives each to a task of `serve`, which ends with the connection."""

    def __init__(self, limits: Limits, serve: Callable[[Connection], Awaitable[None]]) -> None:
        self._limits, self._serve = limits, serve
        self._servers: list[asyncio.Server] = []
        self._connections: set[asyncio.Future[None]] = set()

    async def listen_unix(self, path: Path) -> None:
        """Listen on a socket in a folder of our own. Raises `OSError` where that cannot be."""
        loop = asyncio.get_running_loop()
        server = await loop.create_unix_server(self._accept, str(path), backlog=BACKLOG)
        os.chmod(path, 0o600)
        self._servers.append(server)

    async def listen_tcp(self, host: str, token: str) -> int:
        """Listen for other nodes; the port."""

        def gate(said: bytes) -> Limits | None:
            return self._limits if hmac.compare_digest(said, token.encode()) else None

        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: self._accept(gate), host, 0, backlog=BACKLOG)
        self._servers.append(server)
        return int(server.sockets[0].getsockname()[1])

    def stop(self) -> None:
        """Accept nothing more; what is connected stays so."""
        for server in self._servers:
            server.close()

    def _accept(self, gate: Callable[[bytes], Limits | None] | None = None) -> Connection:
        is_unix = gate is None
        connection = Connection(self._limits if is_unix else TOKEN_LIMITS, gate, own_user_only=is_unix)
        if not is_unix:
            asyncio.get_running_loop().call_later(TOKEN_S, _drop_silent, connection)
        task = asyncio.ensure_future(self._serve(connection))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)
        return connection


def _drop_silent(connection: Connection) -> None:
    if connection.is_waiting_at_gate:
        connection.fail(ConnectionEnded("it did not say its token"))
