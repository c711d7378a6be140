"""Processes that do not outlive who has started them, and process groups that are gone."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import sys
import time
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Be killed when the thread that has started this process ends, however it does. To be called in the new one."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


async def until_group_is_gone(leader: int, timeout_s: float) -> None:
    """Wait until nothing of a process group that was killed runs any more, for a bounded time.

    What its leader had started is nobody's child here, and holds its memory until the kernel has ended it.
    """
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            os.killpg(leader, 0)
        except OSError:
            return
        # Some of it is still there, if only as zombies that nobody has waited for.
        if not await asyncio.to_thread(_runs, leader):
            return
        await asyncio.sleep(0.01)


def _runs(leader: int) -> bool:
    for each in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group = each.read_text().rsplit(") ", 1)[1].split()[:3]
        except OSError:
            continue  # It has ended meanwhile.
        if int(group) == leader and state not in "ZX":
            return True
    return False
