"""What vLLM's processes leave behind when they are killed: sockets in a folder, and memory that they have shared.

Both are known by name while they live, and written down: whoever loads a vLLM model next removes what one left that was
killed before it could. Semaphores that a process has made and let go of are known to Python's resource tracker only, a
process that removes them once all others have ended; so it is given the time for that.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
from collections.abc import Iterable
from multiprocessing import resource_tracker
from os import getpid
from pathlib import Path

from deployments.host_memory import tree_of

logger = logging.getLogger("slotpool.engine")

#: A resource tracker ends within this time, in seconds, after those that it works for, or is not waited for any longer.
TRACKER_S = 2.0
PREFIX, LIST = "vllm-", "left-over"
#: Where the shared memory and the semaphores of `multiprocessing` lie, by the names that it gives them.
SHARED = ("/dev/shm/psm_", "/dev/shm/sem.mp-")


def own_folder() -> Path:
    """A folder for the sockets of this process's vLLM. What is left of others that are gone is removed."""
    for folder in Path().glob(PREFIX + "*"):
        owner = folder.name.removeprefix(PREFIX)
        if owner.isdigit() and not Path("/proc", owner).exists():
            with contextlib.suppress(OSError):
                remove(map(Path, (folder / LIST).read_text().splitlines()))
            shutil.rmtree(folder, ignore_errors=True)
    own = Path(f"{PREFIX}{getpid()}").absolute()
    own.mkdir(mode=0o700, exist_ok=True)
    return own


def left_over(pid: int) -> list[Path]:
    """What a process's vLLM would leave, now that it is loaded; it is written down in the process's folder."""
    files = {line.split(maxsplit=5)[5] for each in tree_of(pid) for line in _mapped(each) if "/dev/shm/" in line}
    found = [Path(file) for file in sorted(files) if file.startswith(SHARED)]
    folder = own_folder()
    (folder / LIST).write_text("".join(f"{each}\n" for each in found))
    return [*found, folder]


async def end_tree(pid: int) -> None:
    """Kill all that a process has started, this one, and have its resource tracker remove what they shared by name."""
    for each in tree_of(pid):
        if each != pid and not _is_tracker(each):
            with contextlib.suppress(OSError):
                os.kill(each, signal.SIGKILL)
    # In a thread, since the tracker is waited for without a bound: this process ends anyway.
    try:
        async with asyncio.timeout(TRACKER_S):
            await asyncio.to_thread(_end_tracker)
    except TimeoutError:
        logger.warning("Python's resource tracker has not ended: shared memory may be left in /dev/shm")


def _end_tracker() -> None:
    """Let go of this process's tracker, and wait until it has ended, which it does when nobody else has it."""
    tracker = resource_tracker._resource_tracker
    if getattr(tracker, "_fd", None) is not None:
        tracker._stop()  # type: ignore[attr-defined]


def _is_tracker(pid: int) -> bool:
    try:
        return b"multiprocessing.resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def remove(paths: Iterable[Path]) -> None:
    """Remove files and folders, those that are there."""
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _mapped(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:
        return []
