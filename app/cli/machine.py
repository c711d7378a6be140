"""The machine that a configuration is judged for: this one as its driver tells, or as the command line describes it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class Device(NamedTuple):
    """One GPU; memory in MiB, 0 where nobody knows."""

    name: str
    memory_mib: int
    uuid: str = ""


class Machine(NamedTuple):
    """GPUs in the driver's order, the host's memory in MiB, and why there are no GPUs where there are none."""

    devices: tuple[Device, ...]
    host_mib: int
    no_gpu: str | None = None

    @property
    def device_mib(self) -> int:
        """What the smallest of its devices has, as the scheduler reckons; 0 where nobody knows."""
        return min((each.memory_mib for each in self.devices), default=0)


def machine(gpus: int | None = None, gpu_mib: int | None = None) -> Machine:
    """This machine, or with `gpus` one of so many devices, each of `gpu_mib` or as large as those here. Blocks."""
    from cluster.gpus import read_gpus

    found, reason = read_gpus()
    here = tuple(Device(each.name, each.total_mib, each.uuid) for each in found)
    if gpus is not None:
        known = min((each.memory_mib for each in here), default=0)
        return Machine(tuple(Device("GPU", gpu_mib or known) for _ in range(gpus)), host_memory_mib())
    if gpu_mib is not None:
        here = tuple(each._replace(memory_mib=gpu_mib) for each in here)
    return Machine(here, host_memory_mib(), reason or (None if here else "the driver knows of none"))


def host_memory_mib() -> int:
    """The machine's own memory, in MiB; 0 where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) >> 10 for line in lines if line.startswith("MemTotal:")), 0)
