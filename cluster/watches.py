"""What the ledger's actor watches by itself: the deaths of actors, and the machines of the cluster.

Each watch runs for the actor's life and calls back; whatever goes wrong is logged, and it looks again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from cluster import effects
from cluster.ledger.specs import NodeSpec

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


async def watch_nodes(memory_mib: Callable[[], int], changed: Callable[[dict[str, NodeSpec]], None]) -> None:
    """Call `changed` with all machines whenever they are others than before; `memory_mib` is the budget of each."""
    seen: dict[str, NodeSpec] = {}
    machines = effects.Machines()
    while True:
        try:
            nodes = await machines.read(memory_mib())
            if nodes != seen:
                changed(nodes)
                seen = nodes
            # Only now, since a driver on another machine may take its time to answer.
            if await machines.ask_devices():
                continue
        except Exception:
            logger.exception("could not read the list of machines")
        await asyncio.sleep(NODES_PERIOD_S)
