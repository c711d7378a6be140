"""Keeps other Ray jobs off the devices of a pool whose replicas take next to nothing of Ray's books.

One placement group per machine, which costs no process, holds its devices for as long as any replica or ingress of
the pool lives. The ledger's actor is its one owner: a later life finds what a former one has made by its name. On a
machine where another job has a device already, the pool has none, until the job is gone.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Mapping

from cluster import effects
from cluster.ledger.specs import NodeSpec

logger = logging.getLogger("slotpool.ledger")

#: For how long the devices stay reserved when nothing of the pool is left, in seconds: an ingress that has died, or is
#: deployed anew, is back by then.
UNUSED_S = 30.0
#: A free machine's devices are reserved within this time, in seconds; whatever takes longer is waited for elsewhere.
READY_S = 1.0
PERIOD_S = 0.02


class Reservation:
    """The devices of all machines."""

    def __init__(self) -> None:
        self._used_at = time.monotonic()
        self._missing: set[str] = set()
        self._may_hold = True

    async def hold(self, nodes: Mapping[str, NodeSpec], *, is_wanted: bool, is_used: bool) -> dict[str, NodeSpec]:
        """Reserve the devices, or give them back; the machines, without devices where those could not be had.

        `is_wanted`: the pool's replicas do not take the devices themselves. `is_used`: something of the pool lives.
        Takes milliseconds where nothing changes, and at most a little more than `READY_S`.
        """
        now = time.monotonic()
        if is_used:
            self._used_at = now
        keep = is_wanted and now < self._used_at + UNUSED_S
        if not (keep or self._may_hold):
            return dict(nodes)
        wanted = {name: node.gpus for name, node in nodes.items() if node.gpus} if keep else {}
        there = await asyncio.to_thread(effects.reservations)
        for name in there.keys() - wanted.keys():
            await asyncio.to_thread(effects.release_devices, name)
        self._may_hold = keep
        if not keep:
            return dict(nodes)
        for name in wanted.keys() - there.keys():
            await asyncio.to_thread(effects.reserve_devices, name, wanted[name])
        held = await self._ready(wanted)
        missing = wanted.keys() - held
        for name in missing - self._missing:
            logger.warning("the devices of node %s are taken by other jobs of this Ray: the pool waits for them", name)
        self._missing = missing
        return {name: dataclasses.replace(node, gpus=0) if name in missing else node for name, node in nodes.items()}

    async def _ready(self, wanted: Mapping[str, int]) -> set[str]:
        """Which of these machines' devices are reserved."""
        until = time.monotonic() + READY_S
        while True:
            states = await asyncio.to_thread(effects.reservations)
            held = {name for name in wanted if states.get(name)}
            # What was waited for the last time already is not waited for again.
            if wanted.keys() - held <= self._missing or time.monotonic() > until:
                return held
            await asyncio.sleep(PERIOD_S)
