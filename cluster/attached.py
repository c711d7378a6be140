"""Who is attached to the ledger's actor: replicas with their engines and orders, and the holders of leases.

It keeps what callers said of themselves and what they were ordered, and decides nothing.
"""

from __future__ import annotations

import asyncio
import logging

from cluster import effects
from cluster.announcements import HolderState, ReplicaState
from cluster.ledger.snapshot import ReplicaRow
from cluster.orders import AsleepState, EngineState, OrderBoard, Restart

logger = logging.getLogger("slotpool.ledger")

#: How long a replica may take to carry out an order to restart its engine, in seconds. One that hangs itself never
#: does, and its whole process is ended.
RESTART_S = 10.0


class Attached:
    """The replicas and holders that this life of the ledger knows, by the ids of their actors."""

    def __init__(self) -> None:
        self.orders = OrderBoard()
        self.replicas: dict[str, ReplicaState] = {}
        self.progress: dict[str, float] = {}
        self._replica_of_actor: dict[str, str] = {}
        self._holder_of_actor: dict[str, str] = {}
        self._guests: set[str] = set()
        self._gone: dict[str, asyncio.Event] = {}
        self._sent: dict[str, int] = {}
        self._restarts: dict[str, asyncio.TimerHandle] = {}
        self._ending: set[asyncio.Task[None]] = set()

    def actors(self) -> list[str]:
        """The ids of all actors that are attached."""
        return [*self._replica_of_actor, *self._holder_of_actor]

    def has_pool(self) -> bool:
        """Whether anything of the pool itself is attached; jobs that only use it are not."""
        return bool(self._replica_of_actor) or not self._holder_of_actor.keys() <= self._guests

    def add_replica(self, state: ReplicaState) -> None:
        self.replicas[state.replica] = state
        self._replica_of_actor[state.actor_id] = state.replica
        self._gone.setdefault(state.actor_id, asyncio.Event())

    def add_holder(self, state: HolderState) -> None:
        self._holder_of_actor[state.actor_id] = state.holder
        if state.is_guest:
            self._guests.add(state.actor_id)
        self._gone.setdefault(state.actor_id, asyncio.Event())

    async def until_gone(self, actor_id: str) -> None:
        """Wait until an actor that has attached itself is removed."""
        gone = self._gone.get(actor_id)
        if gone is not None:
            await gone.wait()

    @property
    def has_holders(self) -> bool:
        return bool(self._holder_of_actor)

    def has_holder(self, state: HolderState) -> bool:
        return state.actor_id in self._holder_of_actor

    def remove(self, actor_id: str) -> tuple[str | None, str | None]:
        """Forget a dead actor; the replica and the holder that it was."""
        replica = self._replica_of_actor.pop(actor_id, None)
        if replica is not None:
            self.engine_ended(replica)
            self.replicas.pop(replica, None)
            self.orders.forget(replica)
        holder = self._holder_of_actor.pop(actor_id, None)
        self._guests.discard(actor_id)
        if holder is not None:
            self._sent.pop(holder, None)
        gone = self._gone.pop(actor_id, None)
        if gone is not None:
            gone.set()
        return replica, holder

    # --- holders --------------------------------------------------------------------------------------------------

    def has_sent(self, holder: str, number: int) -> None:
        """A holder's message with arrivals is here."""
        if number > self._sent.get(holder, 0):
            self._sent[holder] = number

    def is_overtaken(self, state: HolderState) -> bool:
        """Whether requests are here that the holder sent after it described itself: it knows nothing of them."""
        return state.sent < self._sent.get(state.holder, 0)

    # --- engines --------------------------------------------------------------------------------------------------

    def engine_ready(self, replica: str, engine: EngineState) -> None:
        self.engine_ended(replica)
        if replica in self.replicas:
            self.replicas[replica] = self.replicas[replica]._replace(
                engine=engine, failed=None, loading=False, asleep=None
            )

    def engine_asleep(self, replica: str, asleep: AsleepState) -> None:
        self.engine_ended(replica)
        if replica in self.replicas:
            self.replicas[replica] = self.replicas[replica]._replace(asleep=asleep)

    def engine_ended(self, replica: str) -> None:
        """What was known of the engine of a replica is history, and so is a restart that it was ordered."""
        self.progress.pop(replica, None)
        restart = self._restarts.pop(replica, None)
        if restart is not None:
            restart.cancel()
        if replica in self.replicas:
            self.replicas[replica] = self.replicas[replica]._replace(engine=None, loading=False, asleep=None)

    def described(self, row: ReplicaRow) -> ReplicaRow:
        """A row of the ledger's snapshot with what its replica said of itself."""
        state = self.replicas.get(row.replica or "")
        if state is None:
            return row
        engine = state.engine
        pid, url = (None, None) if engine is None else (engine.pid, engine.url)
        fraction = self.progress.get(state.replica) if row.state == "LOADING" else None
        progress = None if fraction is None else round(fraction, 3)
        return row._replace(pid=pid, url=url, started_at=state.started_at, progress=progress)

    def restart_engine(self, replica: str) -> None:
        """Order a replica to restart its engine; if nothing comes of it, the replica's own process hangs and ends."""
        self.orders.give(replica, Restart("it does not answer"))
        loop = asyncio.get_event_loop()
        self._restarts[replica] = loop.call_later(RESTART_S, self._restart_failed, replica)

    def _restart_failed(self, replica: str) -> None:
        del self._restarts[replica]
        self.end_replica(replica, f"it did not restart its engine within {RESTART_S:g} s")

    def end_replica(self, replica: str, why: str) -> None:
        """End the process of a replica that hangs itself. Never blocks."""
        logger.error("the process of replica %s is ended: %s", replica, why)
        ending = asyncio.get_event_loop().create_task(effects.kill_replica(replica))
        self._ending.add(ending)
        ending.add_done_callback(self._ending.discard)
