"""What processes of this machine hold of its memory and its devices', and what is left, from `/proc` and the driver."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from cluster import gpus


def held_mib(pid: int) -> int:
    """A process's proportional set size (PSS): what several share counts once in their sum. 0 if it is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) >> 10


def tree_mib(pid: int) -> int:
    """The same of a process and all that it has started. Takes milliseconds for each gigabyte."""
    return sum(map(held_mib, tree_of(pid)))


def tree_device_mib(pid: int) -> int | None:
    """What a process and all that it has started hold of the devices' memory; None where the driver does not say."""
    held = [mib for each in tree_of(pid) if (mib := gpus.held_mib(each)) is not None]
    return sum(held) if held else None


def tree_of(pid: int) -> Iterator[int]:
    """A process and all that it has started, as far as they live."""
    left = [pid]
    while left:
        each = left.pop()
        yield each
        try:
            for task in Path(f"/proc/{each}/task").iterdir():
                left += map(int, (task / "children").read_text().split())
        except OSError:
            pass  # It has ended meanwhile.


def available_bytes() -> int:
    """What new allocations may still take of this machine's memory, or of what its container was given."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) << 10
    try:
        limit, used = (int(Path("/sys/fs/cgroup", name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):
        return available  # No container, or one without a limit.
    return max(0, min(available, limit - used))
