"""A process that stands for Ray's own on a machine, and what tests ask of the processes that are started for it."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from cluster.home import Home, home_of


class Raylet:
    """A process that stands for Ray's own: what is started for it ends with it."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(["sleep", "1000"])
        self.home = home_of(self.process.pid)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def started_raylet() -> Iterator[Raylet]:
    raylet = Raylet()
    try:
        yield raylet
    finally:
        raylet.end()
        wait_until(lambda: not (raylet.home.folder / "nursery.sock").exists())
        shutil.rmtree(raylet.home.folder, ignore_errors=True)


def wait_until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def lives(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path("/proc", str(pid), "stat").read_text().rsplit(") ", 1)[1][0] != "Z"
    return False


def nursery_pid(home: Home) -> int:
    """The nursery that listens there."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.connect(str(home.folder / "nursery.sock"))
        credentials = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        return int.from_bytes(credentials[:4], sys.byteorder)
