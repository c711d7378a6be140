"""The mailbox around the ledger: one actor that turns calls into events and carries commands out.

It owns the ledger, the calls parked until their request is granted, and one timer. Every method does its work in one
step of the event loop, so the ledger is never seen half-changed. It must never wait for anything while it decides.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
import uuid
from collections.abc import Sequence
from typing import Any, NamedTuple

from cluster import effects, watchdog
from cluster.announcements import HolderState, ReplicaState
from cluster.ledger.events import (
    ConfigChanged,
    Grant,
    HolderDied,
    LeaseReannounced,
    LeaseReleased,
    LoadRefused,
    LoadRequested,
    NodesChanged,
    Quiesce,
    Reject,
    ReplicaFailed,
    ReplicaGone,
    ReplicaReady,
    ReplicaStarted,
    RequestArrived,
    RequestCancelled,
    ServerSuspected,
    SetDesired,
    Ticked,
    UnloadRequested,
)
from cluster.ledger.ledger import Ledger
from cluster.ledger.snapshot import ReplicaRow, Snapshot
from cluster.ledger.specs import PoolSpec
from cluster.metrics import Outcome
from cluster.operator_calls import Ended, OperatorCalls, refuse_unload
from cluster.request import Request

logger = logging.getLogger("slotpool.ledger")

#: How long a new life of the ledger collects announcements before it decides anything, in seconds. Replicas and
#: ingresses notice the death of its former life within milliseconds and come back within the actor's restart.
RECOVERY_S = 2.0
#: How often the list of machines is read, in seconds; nothing but the arrival of a new machine waits for it.
NODES_PERIOD_S = 5.0


#: Events that are progress by themselves, whatever the ledger decides about them.
_PROGRESS = (LeaseReleased, ReplicaStarted, ReplicaReady, ReplicaFailed, ReplicaGone)


class _Parked(NamedTuple):
    """A call that waits for its answer."""

    holder: str
    answer: asyncio.Future[Grant | Reject]


class LedgerActor:
    """The pool's one scheduler. Callers get values, never exceptions, for whatever the ledger decides."""

    def __init__(self, spec: PoolSpec) -> None:
        now = time.monotonic()
        restarted = effects.was_restarted()
        self.epoch = uuid.uuid4().hex[:12]
        self._ledger = Ledger(spec, epoch=self.epoch, now=now, recovering_until=now + RECOVERY_S if restarted else None)
        self._spec = spec
        self._parked: dict[str, _Parked] = {}
        self._replica_of_actor: dict[str, str] = {}
        self._drains: dict[str, asyncio.Event] = {}
        self._holder_of_actor: dict[str, str] = {}
        self._progress: dict[str, float] = {}
        self._operators = OperatorCalls(self._ledger)
        self._moved_at = now
        self._desired: dict[str, int] = {}
        self._desired_version = 0
        self._desired_changed = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        loop = asyncio.get_event_loop()
        self._servers: Any = None
        self._tasks = [
            loop.create_task(self._watch_deaths()),
            loop.create_task(self._watch_nodes()),
            loop.create_task(self._follow_servers()),
        ]

    # --- the request path ---------------------------------------------------------------------------------------

    async def acquire(self, holder: str, request: Request) -> Grant | Reject:
        """Wait for a slot. Parks until the request is granted, refused or out of time; idempotent by its id."""
        answer = await asyncio.shield(self._arrive(holder, request))
        self._parked.pop(request.id, None)
        return answer

    async def acquire_now(self, holder: str, requests: list[Request]) -> list[Grant | Reject | None]:
        """Many arrivals in one message. What is decided at once is answered, None stands for a request that waits.

        Its answer is kept until the caller takes it with `acquire` under the same id, or gives up with `settle`.
        """
        answers = [self._arrive(holder, request) for request in requests]
        decided = [answer.result() if answer.done() else None for answer in answers]
        for request, answer in zip(requests, decided, strict=True):
            if answer is not None:
                self._parked.pop(request.id, None)
        return decided

    async def settle(self, settled: list[tuple[str, int | None, Outcome | None]]) -> None:
        """Give leases back, each by its request and generation; with None the client has left, wherever it stood."""
        for request, generation, _ in settled:
            if generation is not None:
                self._post(LeaseReleased(request, generation))
                continue
            self._post(RequestCancelled(request))
            parked = self._parked.pop(request, None)
            if parked is not None:
                parked.answer.cancel()

    async def waiting(self, request: str) -> tuple[str, int | str] | None:
        """Where a request waits: ("queued", position), ("loading", model), or None when it does not wait."""
        return self._ledger.queue_position(request)

    # --- replicas and ingresses ---------------------------------------------------------------------------------

    async def attach_replica(self, state: ReplicaState) -> None:
        """Announce a replica. Parks for as long as this ledger lives, so that its end is an event for the caller."""
        self._replica_of_actor[state.actor_id] = state.replica
        # Its engine loads unasked, from its start.
        self._post(ReplicaStarted(state.model, state.replica, state.node, loading=True))
        if state.failed is not None:
            self._post(ReplicaFailed(state.replica, state.failed))
        elif state.engine is not None:
            self._post(ReplicaReady(state.replica, state.engine.memory_mib))
        await self._park_while_alive(state.actor_id)

    async def attach_holder(self, state: HolderState) -> None:
        """Announce an ingress with the leases it holds, and the configuration it runs. Parks like a replica's."""
        self._holder_of_actor[state.actor_id] = state.holder
        spec = state.configuration.pool.spec()
        if spec != self._spec:
            self._spec = spec
            self._post(ConfigChanged(spec))
            await self._follow_servers()
        for lease in state.leases:
            self._post(
                LeaseReannounced(
                    lease.request,
                    lease.holder,
                    lease.model,
                    lease.replica,
                    lease.generation,
                    slots=len(lease.slots),
                )
            )
        await self._park_while_alive(state.actor_id)

    async def replica_progress(self, replica: str, fraction: float) -> None:
        """How much of a replica's load is done, 0.0 to 1.0; for people to see, nothing is decided by it."""
        self._progress[replica] = fraction

    async def replica_ready(self, replica: str, memory_mib: int | None) -> None:
        """The engine of a replica serves now."""
        self._progress.pop(replica, None)
        self._post(ReplicaReady(replica, memory_mib))

    async def replica_failed(self, replica: str, reason: str) -> None:
        """The engine of a replica could not be loaded."""
        self._progress.pop(replica, None)
        self._post(ReplicaFailed(replica, reason))

    async def drained(self, replica: str) -> None:
        """Parks until the ledger next drains a replica, or the replica is dead."""
        await self._drains.setdefault(replica, asyncio.Event()).wait()

    async def server_lost(self, url: str) -> None:
        """A request lost its external server, before or in its answer: look at once whether it is still there."""
        self._post(ServerSuspected(url))
        if self._servers is not None:
            self._servers.check_now(url)

    async def desired(self, seen_version: int, timeout_s: float = 30.0) -> tuple[int, dict[str, int]]:
        """The number of replicas wanted per model. Parks until it differs from `seen_version`, or `timeout_s`."""
        with contextlib.suppress(TimeoutError):
            while self._desired_version == seen_version or self._ledger.is_recovering:
                await asyncio.wait_for(self._desired_changed.wait(), timeout_s)
        return self._desired_version, dict(self._desired)

    # --- operators ----------------------------------------------------------------------------------------------

    async def load(self, model: str, replicas: int) -> Ended:
        """Load so many replicas, all or none. Parks until they are ready, refused, or have failed and are gone."""
        await self._recovered()
        for command in self._post(LoadRequested(model, replicas)):
            if isinstance(command, LoadRefused) and command.model == model:
                return command
        return await self._operators.until(model, replicas)

    async def unload(self, model: str) -> Ended:
        """Unload a model: its queue is refused, its streams finish. Parks until it is gone; refused while it loads."""
        await self._recovered()
        refusal = refuse_unload(model, self._ledger.model(model))
        if refusal is not None:
            return refusal
        self._post(UnloadRequested(model))
        return await self._operators.until(model, 0)

    async def _recovered(self) -> None:
        """Wait until this life of the ledger knows what the former one left; it tells by itself when that is."""
        while self._ledger.is_recovering:
            await self._desired_changed.wait()

    # --- for people ---------------------------------------------------------------------------------------------

    async def status(self) -> Snapshot:
        """The ledger's life, with the progress of the loads under way."""
        now = time.monotonic()
        snapshot = self._ledger.snapshot()
        return dataclasses.replace(
            snapshot,
            replicas=tuple(self._with_progress(row) for row in snapshot.replicas),
            now=now,
            time=time.time(),
            stalled=watchdog.stalled(snapshot, self._moved_at, now, watchdog.limit_s(self._spec)),
        )

    def _with_progress(self, row: ReplicaRow) -> ReplicaRow:
        fraction = self._progress.get(row.replica or "") if row.state == "STARTING" else None
        return row if fraction is None else dataclasses.replace(row, progress=round(fraction, 3))

    async def check(self) -> str | None:
        """The first broken invariant in words, or None."""
        try:
            self._ledger.check()
        except AssertionError as error:
            return str(error) or "an invariant is broken"
        return None

    # --- inside -------------------------------------------------------------------------------------------------

    def _arrive(self, holder: str, request: Request) -> asyncio.Future[Grant | Reject]:
        """The answer to a request, which has arrived now or before."""
        parked = self._parked.get(request.id)
        if parked is None:
            parked = self._parked[request.id] = _Parked(holder, asyncio.get_running_loop().create_future())
            deadline = time.monotonic() + request.timeout_s
            arrived = RequestArrived(
                request.id, holder, request.model, request.priority, deadline, request.keep_alive_s
            )
            self._post(arrived)
        return parked.answer

    def _post(self, event: Any) -> list[Any]:
        now = time.monotonic()
        commands = self._ledger.decide(event, now)
        if isinstance(event, _PROGRESS) or any(type(command) is not Reject for command in commands):
            self._moved_at = now
        self._carry_out(commands)
        self._arm_timer()
        # What a new order is told concerns its own caller alone.
        self._operators.review(() if isinstance(event, LoadRequested) else commands)
        return commands

    def _carry_out(self, commands: Sequence[Any]) -> None:
        rescaled = False
        for command in commands:
            if isinstance(command, Grant | Reject):
                self._answer(command)
            elif isinstance(command, SetDesired):
                self._desired[command.model] = command.replicas
                rescaled = True
            elif isinstance(command, Quiesce):
                self._tell_of_drain(command.replica)
        if rescaled:
            self._publish_desired()

    def _answer(self, answer: Grant | Reject) -> None:
        parked = self._parked.get(answer.request)
        if parked is not None and not parked.answer.done():
            parked.answer.set_result(answer)
        elif isinstance(answer, Grant):
            # Nobody waits for this grant any more: its caller vanished between the two events.
            logger.warning("grant %s has no taker, released", answer.request)
            self._post(LeaseReleased(answer.request, answer.generation))

    def _tell_of_drain(self, replica: str) -> None:
        closes = self._drains.pop(replica, None)
        if closes is not None:
            closes.set()

    def _publish_desired(self) -> None:
        self._desired_version += 1
        self._desired_changed.set()
        self._desired_changed = asyncio.Event()

    def _arm_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        deadline = self._ledger.next_deadline()
        if deadline is not None:
            delay = max(0.001, deadline - time.monotonic())
            self._timer = asyncio.get_event_loop().call_later(delay, self._post, Ticked())

    async def _park_while_alive(self, actor_id: str) -> None:
        if await effects.is_dead(actor_id):
            self._bury(actor_id)
        else:
            await asyncio.Event().wait()

    def _bury(self, actor_id: str) -> None:
        replica = self._replica_of_actor.pop(actor_id, None)
        if replica is not None:
            self._progress.pop(replica, None)
            self._tell_of_drain(replica)
            self._post(ReplicaGone(replica))
        holder = self._holder_of_actor.pop(actor_id, None)
        if holder is not None:
            self._post(HolderDied(holder))
            for request in [request for request, parked in self._parked.items() if parked.holder == holder]:
                self._parked.pop(request).answer.cancel()

    async def _watch_deaths(self) -> None:
        while True:
            try:
                async for actor_id in effects.dead_actors():
                    self._bury(actor_id)
            except Exception:
                logger.exception("lost sight of dying actors, looking again")
                await asyncio.sleep(1.0)
                for actor_id in [*self._replica_of_actor, *self._holder_of_actor]:
                    if await effects.is_dead(actor_id):
                        self._bury(actor_id)

    async def _follow_servers(self) -> None:
        """Read the manifests of the configured external servers from now on."""
        if self._servers is None and self._spec.servers:
            # Imports an HTTP client, which a pool without servers does without.
            from cluster.servers.manifests import ManifestWatch

            self._servers = ManifestWatch(self._post)
        if self._servers is not None:
            self._servers.follow(self._spec.servers)

    async def _watch_nodes(self) -> None:
        seen: dict[str, Any] = {}
        machines = effects.Machines()
        while True:
            try:
                nodes = await machines.read(self._spec.node_memory_mib)
                if nodes != seen:
                    self._post(NodesChanged(nodes))
                    seen = nodes
                # Only now, since a driver on another machine may take its time to answer.
                if await machines.ask_devices():
                    continue
            except Exception:
                logger.exception("could not read the list of machines")
            await asyncio.sleep(NODES_PERIOD_S)
