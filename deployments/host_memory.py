"""What processes of this machine hold of its memory, from `/proc`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


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
