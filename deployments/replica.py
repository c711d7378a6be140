"""One replica of one model as Serve sees it: it tells the ledger of its life and supervises an engine process.

It is bound to its model's id and nothing else; everything about the engine comes with the ledger's order to load. A
failed load never raises into Serve, which would restart the process by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator

from ray import serve

from cluster import effects
from cluster.announcements import ReplicaState
from cluster.client import LedgerClient
from cluster.errors import ReplicaGone
from cluster.home import home_of
from deployments.engine_child import start_nursery
from deployments.link import Links
from deployments.supervisor import Place, Supervisor

logger = logging.getLogger("slotpool.replica")

#: So long after its start, and after a pause in the requests, a replica starts spare processes, in seconds.
SPARES_AFTER_S = 5.0
PAUSE_S = 0.5
#: So many are kept on a machine: a visitor's swap takes one, and the swap back another. One takes 140 MiB.
SPARES = 2


class Replica:
    """The Serve deployment class behind every model."""

    async def __init__(self, model: str) -> None:  # type: ignore[misc]
        self._model = model
        self._started_at = time.time()
        self._uid: str = serve.get_replica_context().replica_id.unique_id
        self._actor_id, self._node = effects.this_actor()
        self._placing = asyncio.create_task(self._find_place())
        self._ledger = LedgerClient()
        self._links = Links(self._node)
        self._supervisor = Supervisor(
            model, self._uid, self._ledger, lambda: asyncio.shield(self._placing), self._help_successor
        )
        self._life = [
            asyncio.create_task(self._ledger.stay_attached("attach_replica", self._state)),
            asyncio.create_task(self._supervisor.follow_orders()),
            asyncio.create_task(self._keep_spares()),
        ]

    def _state(self) -> ReplicaState:
        supervisor = self._supervisor
        return ReplicaState(
            self._model,
            self._uid,
            self._actor_id,
            self._node,
            self._started_at,
            supervisor.engine,
            supervisor.failed,
            supervisor.is_loading,
            supervisor.devices,
            supervisor.is_unloading,
            supervisor.asleep,
        )

    async def _find_place(self) -> Place:
        """What the first engine process waits for: a nursery, most of all, where this machine has none yet."""
        return await asyncio.to_thread(self._place)

    def _place(self) -> Place:
        home = home_of(effects.raylet_pid())
        start_nursery(home)
        return Place(self._node, home, effects.log_folder() / f"slotpool-engine-{self._uid}.log", effects.open_host())

    async def relay(self, head: bytes, body: bytes) -> AsyncGenerator[bytes, None]:
        """A leased call for an ingress that reaches no socket of the engine: the frames of its answer, one by one.

        Each item is a frame's kind and payload. Raises `ReplicaGone` without an engine.
        """
        gone = ReplicaGone(f"the engine of {self._model} went away", retry_after=1)
        try:
            way = await self._links.send(self._supervisor.address(), head, body)
        except OSError:
            raise gone from None
        try:
            async for kind, payload in way:
                yield kind + payload
        except OSError:
            raise gone from None
        finally:
            way.close()

    async def _keep_spares(self) -> None:
        """See to it that the next swap here finds a process, which costs more than a second of CPU.

        Not as long as the model answers, on what may be the same cores, nor soon after its start, when the model that
        was here before may come straight back.
        """
        await asyncio.sleep(SPARES_AFTER_S)
        before = None
        while True:
            now = await self._supervisor.load_of_engine()
            if now is not None and now == before and not now[0]:
                break
            before = now
            await asyncio.sleep(PAUSE_S)
        await self._start_spares(SPARES)

    async def _help_successor(self) -> None:
        """Have a process started for the next model while the last streams of this one run, if there is none yet."""
        load = await self._supervisor.load_of_engine()
        if load is not None and load[0]:
            await self._start_spares(1)

    async def _start_spares(self, wanted: int) -> None:
        try:
            await asyncio.to_thread(effects.start_spare_processes, wanted)
        except Exception:
            # Without it the next replica only starts more slowly.
            logger.warning("no spare process was started", exc_info=True)

    async def __del__(self) -> None:
        for task in self._life:
            task.cancel()
        with contextlib.suppress(Exception):
            await self._supervisor.finish()
        self._links.close()
