"""What processes of this machine have used so far, and hold now, from `/proc`. Of one: `OSError` when it is gone."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from app.cli.supervisor import descendants

TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def cpu_s(pid: int) -> float:
    """Seconds of CPU since it began, its own and the kernel's for it."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * TICK_S


def memory_mib(pid: int) -> float:
    """Its proportional set size (PSS): what processes share counts once in their sum."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


@dataclass(frozen=True)
class Held:
    """What a pool's processes hold: memory as the sum of their PSS, and open descriptors but for logs."""

    memory_mib: float
    processes: int
    descriptors: int


def held_by_pool(root: int) -> Held:
    """What the Ray below the process `root` holds, with its forkservers and engines, which descend from nobody."""
    pids = pool_processes(root)
    memory, descriptors = 0.0, 0
    for pid in pids:
        with contextlib.suppress(OSError):
            memory += memory_mib(pid)
            descriptors += _descriptors(pid)
    return Held(round(memory, 1), len(pids), descriptors)


def _descriptors(pid: int) -> int:
    """Without the logs, of which Ray's log monitor keeps up to 200 open, those of processes that are gone, too."""
    open_files = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            open_files.append(os.readlink(link))
    return sum(not each.endswith((".out", ".err", ".log")) for each in open_files)


def pool_processes(root: int) -> list[int]:
    """The processes below `root`, and those of the forkservers that serve a raylet among them."""
    found = descendants(root)
    below = {str(pid).encode() for pid in found}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_bytes().split(b"\0")
            if b"deployments.nursery" in words and words[words.index(b"--raylet") + 1] in below:
                nursery = int(folder.name)
                found += {nursery, *descendants(nursery)} - set(found)
    return found
