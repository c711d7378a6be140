"""Connections between the pool's processes: a Unix socket on one machine, TCP with a token between two.

A Unix socket is believed only in a folder of our own and with our own user at the other end. A TCP connection opens
with a frame that holds the token of the address. A machine that is gone sends no end of its connections, so they are
probed while they are silent.
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
#: A TCP connection is probed once it was silent for so long, this many times and this far apart, in seconds. Nobody
#: waits longer for a machine that has lost its power or its network.
SILENT_S, PROBES, PROBE_S = 5, 5, 2


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
            _, connection = await loop.create_connection(lambda: Connection(limits), sock=await _connected(address))
            connection.write(frame(TOKEN, address.token.encode()))
            return connection
        check_private(Path(address.unix).parent)
        _, connection = await loop.create_unix_connection(lambda: Connection(limits, own_user_only=True), address.unix)
        return connection


async def _connected(address: Address) -> socket.socket:
    connected = _tcp_socket(address.host)
    # Of what is sent nobody waits for an answer either. Not at the other end: a client that reads slowly is no fault.
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, (SILENT_S + PROBES * PROBE_S) * 1000)
    try:
        await asyncio.get_running_loop().sock_connect(connected, (address.host, address.port))
    except BaseException:
        connected.close()
        raise
    return connected


def _tcp_socket(host: str) -> socket.socket:
    """A socket for an address, whose connections (also those that it accepts) are probed while they are silent."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    made.setblocking(False)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {"TCP_KEEPIDLE": SILENT_S, "TCP_KEEPINTVL": PROBE_S, "TCP_KEEPCNT": PROBES, "TCP_NODELAY": 1}
    for name, value in options.items():
        made.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return made


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
        listening = _tcp_socket(host)
        listening.bind((host, 0))
        self._servers.append(await loop.create_server(lambda: self._accept(gate), sock=listening, backlog=BACKLOG))
        return int(listening.getsockname()[1])

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
