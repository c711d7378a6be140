"""What one replica needs, and the place it takes: device shares, CPUs and memory, counted in whole units.

Floats become ten-thousandths (Ray's own resolution), so sums never drift.
"""

from __future__ import annotations

from functools import lru_cache
from math import ceil
from typing import NamedTuple

from cluster.ledger.specs import ModelSpec, NodeSpec

UNIT = 10_000


class Shape(NamedTuple):
    """What one replica of a model needs, and whom it must or must not meet on a device.

    `only` are the devices that it is bound to, as in `ModelSpec.devices`. Without a loaded engine it takes `host` MiB
    of its host's memory, and `held` of each device where its engine sleeps.
    """

    gpu: int
    cpu: int
    memory: int
    group: str | None
    share: bool
    model: str
    only: tuple[str, ...] = ()
    host: int = 0
    held: int = 0

    @property
    def devices(self) -> int:
        return ceil(self.gpu / UNIT)

    @property
    def per_device(self) -> int:
        return min(self.gpu, UNIT)

    @property
    def memory_per_device(self) -> int:
        return self.memory // self.devices if self.gpu else self.held


def asleep_shape(host_mib: int, held_mib: int = 0, devices: int = 0) -> Shape:
    """What a replica takes whose engine is not loaded, and of so many devices if the engine sleeps."""
    return Shape(0, 0, held_mib * devices, None, False, "", host=host_mib, held=held_mib)


def shape_of(spec: ModelSpec, measured_mib: int | None) -> Shape:
    """The need of one replica; a measured memory replaces the configured estimate."""
    memory = spec.memory_mib if measured_mib is None else measured_mib
    gpu, cpu = round(spec.num_gpus * UNIT), round(spec.num_cpus * UNIT)
    # Only grouped models look at their neighbours; all others share one shape, so that a full pool is known as such.
    name = spec.name if spec.group else ""
    return Shape(gpu, cpu, memory, spec.group, spec.group_share, name, spec.devices if gpu else ())


class Place(NamedTuple):
    """Part of a node: what one replica takes of it.

    `booked` are the devices that Ray, which packs by itself, has booked for its process, or will when it starts it.
    They are none where a process takes nothing of Ray's books.
    """

    node: str
    devices: tuple[int, ...]
    shape: Shape
    booked: tuple[int, ...] = ()


@lru_cache(maxsize=1024)
def named_devices(spec: NodeSpec, only: tuple[str, ...]) -> frozenset[int]:
    """The devices of a node that a model's `devices` name; none if they name others."""
    found = set()
    for each in only:
        host, _, device = each.rpartition("/")
        if host and host != spec.name and host not in spec.hosts:
            continue
        index = device_index(spec, device)
        if index is not None and index < spec.gpus:
            found.add(index)
    return frozenset(found)


def device_index(spec: NodeSpec, device: str) -> int | None:
    """A device's index from its index in digits or its UUID; None if the node has none of that name."""
    if device.isdecimal():
        return int(device)
    return spec.device_uuids.index(device) if device in spec.device_uuids else None


def conflicts(one: Shape, other: Shape) -> bool:
    """Two models of a group that must not share a device."""
    if one.group is None or one.group != other.group or one.share:
        return False
    return one.model != other.model
