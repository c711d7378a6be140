"""One replica of one model as Serve sees it: it tells the ledger of its life and supervises an engine process.

It is bound to its model's id and nothing else; everything about the engine comes with the ledger's order to load. A
failed load never raises into Serve, which would restart the process by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncGenerator

from ray import serve

from cluster import effects
from cluster.announcements import ReplicaState
from cluster.client import LedgerClient
from cluster.errors import ReplicaGone
from cluster.home import home_of
from deployments.engine_child import start_nursery
from deployments.host_memory import held_mib
from deployments.link import Links
from deployments.supervisor import Place, Supervisor


class Replica:
    """The Serve deployment class behind every model."""

    async def __init__(self, model: str) -> None:  # type: ignore[misc]
        self._model = model
        self._started_at = time.time()
        self._host_mib = held_mib(os.getpid())
        self._uid: str = serve.get_replica_context().replica_id.unique_id
        self._actor_id, self._node = effects.this_actor()
        self._booked = effects.booked_devices()
        self._placing = asyncio.create_task(self._find_place())
        self._ledger = LedgerClient()
        self._links = Links(self._node)
        self._supervisor = Supervisor(model, self._uid, self._ledger, lambda: asyncio.shield(self._placing))
        self._life = [
            asyncio.create_task(self._ledger.stay_attached("attach_replica", self._state)),
            asyncio.create_task(self._supervisor.follow_orders()),
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
            supervisor.is_finishing,
            self._booked,
            self._host_mib,
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

    async def __del__(self) -> None:
        # It stays attached until its last stream has ended: no new life of the ledger may take its devices for free.
        attached, following = self._life
        following.cancel()
        with contextlib.suppress(Exception):
            await self._supervisor.finish()
        attached.cancel()
        self._links.close()
