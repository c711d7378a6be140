"""The Serve applications of models that were registered at run time: made and removed as the configuration says.

Every ingress sees to it, when it starts and at each change, so an ingress that dies in between leaves nothing undone.
Making an application that is there is skipped: Serve would restart its replicas. One is removed when the newest
configuration has no use for it and no replica of it is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Any

from ray import serve

from cluster.applications import PREFIX, own_applications
from cluster.client import LedgerClient
from cluster.config import PoolConfig

logger = logging.getLogger("slotpool.applications")

#: How often it is looked whether the last replica of a removed model has gone, in seconds.
LEAVING_PERIOD_S = 0.5
#: Pause before what Serve refused is tried again, in seconds.
RETRY_S = 2.0


class Applications:
    """The applications beside the graph. `build` makes the one of a model, as the graph has it."""

    def __init__(self, ledger: LedgerClient, build: Callable[[PoolConfig, str], Any]) -> None:
        self._ledger = ledger
        self._build = build
        self._turn = asyncio.Lock()
        self._changed = asyncio.Event()
        self._changed.set()

    def changed(self) -> None:
        """There is a new configuration; does not wait."""
        self._changed.set()

    async def follow(self) -> None:
        """Keep the applications as the configuration has them. Runs until cancelled."""
        pause_s: float | None = None
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), pause_s)
            self._changed.clear()
            try:
                pause_s = None if await self.reconcile() else LEAVING_PERIOD_S
            except Exception:
                logger.exception("could not bring the applications in line with the configuration, trying again")
                pause_s = RETRY_S

    async def reconcile(self) -> bool:
        """Make the applications that are missing, remove those that are left over; whether nothing is left to do.

        May take seconds. Raises what Serve raises.
        """
        async with self._turn:
            there = await asyncio.to_thread(_replicas_by_application)
            # Only now: an application is made after its model is in the configuration, so none is too new for it.
            configuration = await self._ledger.newest_configuration()
            wanted = own_applications(configuration)
            for name, model in wanted.items():
                if name not in there:
                    await asyncio.to_thread(_deploy, self._build(configuration.pool, model), name)
            surplus = [name for name in there if name not in wanted]
            for name in surplus:
                if not there[name]:
                    await asyncio.to_thread(serve.delete, name)
            return not any(there[name] for name in surplus)


def _replicas_by_application() -> dict[str, int]:
    """The number of replicas of each application of a model's own, in whatever state. Blocks for milliseconds."""
    return {
        name: sum(sum(each.replica_states.values()) for each in application.deployments.values())
        for name, application in serve.status().applications.items()
        if name.startswith(PREFIX)
    }


def _deploy(application: Any, name: str) -> None:
    """Blocks until Serve has the application, which has no replicas at first."""
    logging_config = {"log_level": "WARNING", "enable_access_log": False}
    serve.run(application, name=name, route_prefix=None, logging_config=logging_config)
