"""How many threads evaluate a batch: all of them, or fewer while other processes keep some of them off their cores.

llama.cpp's threads meet at a barrier after every operation, so a team runs at the pace of its slowest member. When the
kernel puts two members on one core, because something else has the other, each spins away the time that its partner
needs: two threads are then several times slower than one (docs/measurements.md, "A noisy neighbour"). The kernel says
how long each thread was ready and had no core; while that is much, the team is smaller.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path

#: Seconds of work between two looks: reading the kernel's figures costs about 0.1 ms.
WINDOW_S = 0.1
LONGEST_WINDOW_S = 1.0
#: Waiting for cores, in cores, from which on the team gets smaller. What tokens on their way out, Ray's processes and
#: a client on the same machine take is less; a neighbour that never rests takes 0.75 or more.
CROWDED = 0.7
#: Seconds before the whole team is tried again; doubled up to the longest while the neighbour stays.
FIRST_RETRY_S = 1.0
LONGEST_RETRY_S = 16.0


def waited_for_cores_s() -> float | None:
    """How long the threads of this process were ready and had no core, in seconds; None where no kernel tells.

    The second figure of `/proc/PID/task/*/schedstat` (Linux, Documentation/scheduler/sched-stats.rst).
    """
    total = 0
    try:
        for thread in os.listdir("/proc/self/task"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                total += int(Path("/proc/self/task", thread, "schedstat").read_bytes().split()[1])
    except (OSError, IndexError, ValueError):
        return None
    return total / 1e9


class Team:
    """The size of a team of threads, `size`; look at it with `changed` after every batch. Not thread-safe.

    `waited_s` and `clock` are the kernel's figure and the time, in seconds.
    """

    def __init__(
        self,
        threads: int,
        waited_s: Callable[[], float | None] = waited_for_cores_s,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.size = threads
        self._whole = threads
        self._waited_s = waited_s
        self._clock = clock
        self._began = clock()
        self._waited = waited_s() if threads > 1 else None
        self._retry_s = FIRST_RETRY_S
        self._retry_at = 0.0

    def changed(self) -> bool:
        """Whether the size is another one since the last call. Reads the kernel's figures once a window."""
        if self._waited is None:
            return False
        now = self._clock()
        took_s = now - self._began
        if took_s < WINDOW_S:
            return False
        before, size = self._waited, self.size
        self._began, self._waited = now, self._waited_s()
        # A pause of the requests tells nothing.
        if self._waited is not None and took_s < LONGEST_WINDOW_S:
            self._judge((self._waited - before) / took_s, now)
        return self.size != size

    def _judge(self, crowding: float, now: float) -> None:
        if self.size < self._whole:
            if now >= self._retry_at:
                self.size = self._whole
        elif crowding >= CROWDED:
            self.size = max(1, self._whole - max(1, round(crowding)))
            self._retry_at = now + self._retry_s
            self._retry_s = min(2 * self._retry_s, LONGEST_RETRY_S)
        else:
            self._retry_s = FIRST_RETRY_S
