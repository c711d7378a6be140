"""Measures what a load took of memory, for engines that run in the replica's own process."""

from __future__ import annotations

import os
from pathlib import Path

from cluster import gpus

MIB = 1 << 20


class LoadMeter:
    """Made just before a load, asked just after it. `on_gpu` says which memory counts: the device's or the host's."""

    def __init__(self, *, on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        self._before = (gpus.held_mib(os.getpid()) or 0) if on_gpu else (resident_mib() or 0)

    def grown_mib(self) -> int | None:
        """By how much this process has grown since; None if that cannot be told on this machine."""
        now = gpus.held_mib(os.getpid()) if self._on_gpu else resident_mib()
        return None if now is None else max(0, now - self._before)


def resident_mib() -> int | None:
    """The memory that this process has in RAM, mapped files included, in MiB; None where there is no /proc."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE") // MIB
