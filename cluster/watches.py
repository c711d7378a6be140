"""What the ledger's actor watches by itself: the deaths of actors, and the machines of the cluster.

Each watch runs for the actor's life and calls back; whatever goes wrong is logged, and it looks again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import NamedTuple

from cluster import effects
from cluster.config.store import KvStoreConfig
from cluster.ledger.specs import NodeSpec
from cluster.reservation import Reservation

logger = logging.getLogger("slotpool.ledger")

#: How often the list of machines is read, in seconds; nothing but the arrival of a new machine waits for it.
NODES_PERIOD_S = 5.0
#: Pause before deaths are looked for anew, in seconds.
RETRY_S = 1.0


async def watch_deaths(known: Callable[[], list[str]], dead: Callable[[str], None]) -> None:
    """Call `dead` with the id of every actor that dies; of those that are `known`, none is missed."""
    while True:
        try:
            async for actor_id in effects.dead_actors():
                dead(actor_id)
        except Exception:
            logger.exception("lost sight of dying actors, looking again")
        try:
            await asyncio.sleep(RETRY_S)
            for actor_id in known():
                if await effects.is_dead(actor_id):
                    dead(actor_id)
        except Exception:
            logger.exception("could not ask which actors are dead")


class Use(NamedTuple):
    """What the pool wants of the machines now: its budget of each one's memory, and whether their devices.

    `kv_store` is what it keeps in each one's memory beside its processes. `reserves`: its replicas do not take the
    devices themselves; `lives`: a replica or an ingress is there.
    """

    memory_mib: int
    kv_store: KvStoreConfig | None
    reserves: bool
    lives: bool


async def watch_nodes(use: Callable[[], Use], changed: Callable[[dict[str, NodeSpec]], None]) -> None:
    """Call `changed` with all machines whenever they are others than before, and keep their devices reserved."""
    seen: dict[str, NodeSpec] = {}
    machines = effects.Machines()
    reservation = Reservation()
    while True:
        try:
            wanted = use()
            nodes = await machines.read(wanted.memory_mib, wanted.kv_store)
            nodes = await reservation.hold(nodes, is_wanted=wanted.reserves, is_used=wanted.lives)
            if nodes != seen:
                changed(nodes)
                seen = nodes
            # Only now, since a driver on another machine may take its time to answer.
            if await machines.ask_devices():
                continue
        except Exception:
            logger.exception("could not read the list of machines")
        await asyncio.sleep(NODES_PERIOD_S)
