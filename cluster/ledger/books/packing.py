"""How Ray packs what processes take of a machine's devices, by books of its own.

It matters where every process takes the share of its engine (`max_asleep` 0). Ray then starts a process only on a
machine where its own books have room for it, whatever devices the engines really use: whole devices in their order,
and a fraction on the device that it fills most. `tests/serve/two_devices.py` compares that with the installed Ray.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cluster.ledger.books.shapes import UNIT, Place, Shape


def pack(free: Sequence[int], shape: Shape) -> tuple[int, ...] | None:
    """The devices on which Ray books a process, of which it has so much free; None if it does not start it."""
    if shape.devices > 1 or shape.gpu == UNIT:
        whole = [index for index, left in enumerate(free) if left == UNIT]
        return tuple(whole[: shape.devices]) if len(whole) >= shape.devices else None
    rooms = [(left, index) for index, left in enumerate(free) if left >= shape.gpu]
    return (min(rooms)[1],) if rooms else None


def packed(free: Sequence[int], shapes: Iterable[Shape]) -> list[int] | None:
    """What is left when Ray has booked all of these, the largest first; None if it does not start one of them."""
    left = list(free)
    for shape in sorted(shapes, key=lambda each: -each.gpu):
        devices = pack(left, shape) if shape.gpu else ()
        if devices is None:
            return None
        for index in devices:
            left[index] -= shape.per_device
    return left


class RayBooks:
    """What Ray has free of the devices of one machine. `are_asked`: processes take what their engines use."""

    __slots__ = ("are_asked", "free")

    def __init__(self, are_asked: bool) -> None:
        self.free: list[int] = []
        self.are_asked = are_asked

    def widen(self, devices: int) -> None:
        self.free += [0] * (devices - len(self.free))

    def resize(self, before: int, after: int) -> None:
        """The machine has another number of devices than before."""
        self.widen(max(before, after))
        for index in range(before, after):
            self.free[index] += UNIT
        for index in range(after, before):
            self.free[index] -= UNIT

    def take(self, place: Place, sign: int) -> None:
        """Take (1) or give back (-1) what Ray has booked for a process."""
        for index in place.booked:
            self.free[index] -= sign * place.shape.per_device

    def pack(self, shape: Shape) -> tuple[int, ...] | None:
        """Where Ray would book a process now; None if it would not start it here."""
        return pack(self.free, shape) if self.are_asked and shape.gpu else ()

    def after(self, leaving: Iterable[Place]) -> list[int]:
        """What is free on each device when these have left."""
        free = list(self.free)
        for place in leaving:
            for index in place.booked:
                free[index] += place.shape.per_device
        return free

    def breaks(self, promised: Iterable[Shape], leaving: Iterable[Place], place: Place) -> bool:
        """Whether Ray could not start what is promised room here, once all has left, for this one that it starts now.

        Ray knows of no promise. What it could not keep anyway is no reason to keep anybody out.
        """
        shapes, free = list(promised), self.after(leaving)
        if not (place.booked and shapes) or packed(free, shapes) is None:
            return False
        for index in place.booked:
            free[index] -= place.shape.per_device
        return packed(free, shapes) is None
