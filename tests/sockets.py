"""The sockets of this machine as the kernel lists them: who listens, who is connected, and whose they are."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Tcp(NamedTuple):
    """One IPv4 socket: its own port, the other end's, its inode, and the kernel's timer that runs for it.

    One that listens has no other end.
    """

    port: int
    other: int
    listens: bool
    inode: str
    timer: str


def tcp() -> Iterator[Tcp]:
    """All that listen or are connected."""
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] in ("0A", "01"):
            port, other = (int(fields[at].partition(":")[2], 16) for at in (1, 2))
            yield Tcp(port, other, fields[3] == "0A", fields[9], fields[5][:2])


def open_sockets() -> Iterator[tuple[int, str]]:
    """Every socket of every process that may be looked at: its owner and its inode."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            target = os.readlink(link)
            if target.startswith("socket:["):
                yield int(link.parts[2]), target[8:-1]


def owner(inode: str) -> int | None:
    """A process that has this socket open."""
    return next((pid for pid, each in open_sockets() if each == inode), None)


def listeners(port: int) -> list[str]:
    """The sockets that listen on a port."""
    return [each.inode for each in tcp() if each.listens and each.port == port]


def connections(port: int) -> int:
    """How many connections lead to a port."""
    return sum(not each.listens and each.other == port for each in tcp())


def server_of(port: int, client: int) -> int | None:
    """The process that serves a connection from a port of this machine to another."""
    found = (each for each in tcp() if not each.listens and (each.port, each.other) == (port, client))
    return next((owner(each.inode) for each in found), None)
