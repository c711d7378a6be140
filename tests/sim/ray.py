"""Ray's own rules, as the simulation and the state machine play them; `tests/serve/two_devices.py` and
`two_nodes.py` check each.

Which node a start gets: any on which Ray's own books have room for it. Which devices Ray books for it there: whole ones
in their order, a fraction on the device that it fills most, the first of several. What an engine really uses is no
matter to Ray.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from cluster.ledger.specs import ModelSpec, NodeSpec


class Started(Protocol):
    """A process that Ray has started, and what it has booked for it."""

    @property
    def node(self) -> str: ...

    @property
    def model(self) -> str: ...

    @property
    def booked(self) -> tuple[int, ...]: ...


def choices(
    spec: ModelSpec, nodes: Mapping[str, NodeSpec], there: Iterable[Started], models: Mapping[str, ModelSpec]
) -> dict[str, tuple[int, ...]]:
    """The nodes of which Ray may choose one for a process, with the devices that it would book there."""
    there = list(there)
    found = {}
    for name, node in nodes.items():
        here = [each for each in there if each.node == name]
        cpus = node.cpus - sum(models[each.model].num_cpus for each in here)
        used = [
            sum(min(1.0, models[each.model].num_gpus) for each in here if i in each.booked) for i in range(node.gpus)
        ]
        booked = devices([1.0 - each for each in used], spec.num_gpus)
        if booked is not None and cpus > spec.num_cpus - 1e-9:
            found[name] = booked
    return found


def devices(free: list[float], gpus: float) -> tuple[int, ...] | None:
    """What Ray books for a process of devices that are so free; None if it has no room there."""
    if gpus >= 1.0:
        whole = [index for index, each in enumerate(free) if each > 1.0 - 1e-9]
        return tuple(whole[: round(gpus)]) if len(whole) >= gpus else None
    if not gpus:
        return ()
    fits = [index for index, each in enumerate(free) if each > gpus - 1e-9]
    return (min(fits, key=lambda index: (round(free[index], 6), index)),) if fits else None
