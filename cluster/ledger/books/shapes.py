"""What one replica needs, and the place it takes: device shares, CPUs and memory, counted in whole units.

Floats become ten-thousandths (Ray's own resolution), so sums never drift.
"""

from __future__ import annotations

from math import ceil
from typing import NamedTuple

from cluster.ledger.specs import ModelSpec

UNIT = 10_000


class Shape(NamedTuple):
    """What one replica of a model needs, and whom it must or must not meet on a device."""

    gpu: int
    cpu: int
    memory: int
    group: str | None
    share: bool
    model: str

    @property
    def devices(self) -> int:
        return ceil(self.gpu / UNIT)

    @property
    def per_device(self) -> int:
        return min(self.gpu, UNIT)

    @property
    def memory_per_device(self) -> int:
        return self.memory // self.devices if self.gpu else 0


def shape_of(spec: ModelSpec, measured_mib: int | None) -> Shape:
    """The need of one replica; a measured memory replaces the configured estimate."""
    memory = spec.memory_mib if measured_mib is None else measured_mib
    gpu, cpu = round(spec.num_gpus * UNIT), round(spec.num_cpus * UNIT)
    # Only grouped models look at their neighbours; all others share one shape, so that a full pool is known as such.
    return Shape(gpu, cpu, memory, spec.group, spec.group_share, spec.name if spec.group else "")


class Place(NamedTuple):
    """Part of a node: what one replica takes of it."""

    node: str
    devices: tuple[int, ...]
    shape: Shape


def conflicts(one: Shape, other: Shape) -> bool:
    """Two models of a group that must not share a device."""
    if one.group is None or one.group != other.group or one.share:
        return False
    return one.model != other.model
