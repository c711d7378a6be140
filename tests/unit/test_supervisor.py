"""The parent of a pool: one signal to the group stops the pool in order, and nothing is left of it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.cli.supervisor import descendants

#: A pool in small: it starts a process that ignores signals, one that orphans another, and stops as it is told to.
POOL = r"""
import os, signal, subprocess, sys, time
from app.cli import supervisor
supervisor.GRACE_S = 2.0
supervisor.LEFTOVER_S = 0.2
supervisor.continue_in_own_session()
stubborn = "import os, signal, time; signal.signal(15, signal.SIG_IGN); os.write(1, b'up\\n'); time.sleep(30)"
subprocess.Popen([sys.executable, "-c", stubborn])
subprocess.Popen(["sh", "-c", "sleep 30 & echo up"])
manner = sys.argv[1]
try:
    if manner == "fails":
        sys.exit(3)
    os.write(1, b"up\n")
    time.sleep(30)
except KeyboardInterrupt:
    os.write(1, b"stopping\n")
    if manner == "hangs":
        time.sleep(30)
"""


@contextlib.contextmanager
def pool(manner: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", POOL, manner], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        yield process
    finally:
        for pid in [*descendants(process.pid), process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()


def is_there(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def wait_up(process: subprocess.Popen[str]) -> list[int]:
    """All of the pool's processes, once its three parts have said that they run."""
    assert process.stdout is not None
    for _ in range(3):
        assert process.stdout.readline() == "up\n"
    found = descendants(process.pid)
    assert len(found) >= 3
    return found


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_group_stops_the_pool_and_leaves_nothing(stop: signal.Signals):
    with pool("stops") as process:
        parts = wait_up(process)
        os.killpg(process.pid, stop)
        output, _ = process.communicate(timeout=30)
        assert output == "stopping\n"
        assert process.returncode == 0
        assert not [pid for pid in parts if is_there(pid)]


def test_a_pool_that_hangs_is_killed_after_its_grace():
    with pool("hangs") as process:
        parts = wait_up(process)
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(30) == 1
        assert not [pid for pid in parts if is_there(pid)]


def test_the_second_signal_does_not_wait():
    with pool("hangs") as process:
        parts = wait_up(process)
        os.killpg(process.pid, signal.SIGINT)
        assert process.stdout is not None
        assert process.stdout.readline() == "stopping\n"
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(30) == 1
        assert not [pid for pid in parts if is_there(pid)]


def test_a_pool_that_fails_gives_its_status():
    with pool("fails") as process:
        assert process.wait(30) == 3


def test_the_pool_does_not_outlive_a_parent_that_is_killed():
    with pool("stops") as process:
        parts = wait_up(process)
        child = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])
        os.kill(process.pid, signal.SIGKILL)
        process.wait(30)
        deadline = time.monotonic() + 30
        while is_there(child):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        # Its own orphans are nobody's any more: in a real pool Ray ends them.
        for part in parts:
            with contextlib.suppress(ProcessLookupError):
                os.kill(part, signal.SIGKILL)
