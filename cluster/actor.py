"""The ledger's actor: what replicas, ingresses, Serve and operators call, each call an event for the mailbox.

It owns the ways on which calls come: Ray's, and the sockets of the holders. What is decided, and what comes of it, is
the mailbox's business.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from cluster import effects, prometheus, ray_metrics, watchdog, watches
from cluster.announcements import HolderState, ReplicaState
from cluster.changes import BATCH, Changes
from cluster.config import ConfigError
from cluster.config.version import Configuration
from cluster.home import home_of
from cluster.lease_link import Settled
from cluster.lease_server import LeaseServer
from cluster.ledger.events import (
    EngineAsleep,
    EngineDied,
    EngineUnloaded,
    Grant,
    HolderAnnounced,
    HolderDied,
    LeaseReannounced,
    LeaseReleased,
    LoadRefused,
    LoadRequested,
    NodesChanged,
    Reject,
    ReplicaFailed,
    ReplicaGone,
    ReplicaReady,
    ReplicaStarted,
    ReplicaStopping,
    ReplicaSuspected,
    RequestArrived,
    RequestCancelled,
    ServerSuspected,
    UnloadRequested,
)
from cluster.ledger.snapshot import Snapshot
from cluster.ledger.specs import NodeSpec
from cluster.mailbox import Mailbox
from cluster.metrics import Outcome, refused
from cluster.operator_calls import Ended, refuse_overrides, refuse_unload
from cluster.orders import Address, AsleepState, EngineState, Order
from cluster.parked import Answer, Packed, packed
from cluster.request import Request
from cluster.waiting import Place

logger = logging.getLogger("slotpool.ledger")


class LedgerActor(Mailbox):
    """The pool's one scheduler. Callers get values, never exceptions, for whatever the ledger decides."""

    def __init__(self, configuration: Configuration) -> None:
        super().__init__(configuration)
        self._leases = LeaseServer(self._arrivals, self._settle, self._parked.take)
        loop = asyncio.get_event_loop()
        self._tasks = {
            loop.create_task(watches.watch_deaths(self._attached.actors, self._on_actor_dead)),
            loop.create_task(ray_metrics.keep_telling(lambda: prometheus.families(self._counts, self._snapshot()))),
            loop.create_task(watches.watch_nodes(self._use, self._nodes_changed)),
            loop.create_task(self._find_replicas()),
        }

    # --- the request path ---------------------------------------------------------------------------------------

    async def acquire(self, holder: str, request: Request) -> Grant | Reject:
        """Wait for a slot. Parks until the request is granted, refused or out of time; idempotent by its id."""
        answer = await asyncio.shield(self._arrive(holder, request))
        self._parked.take(request.id)
        return answer

    async def acquire_now(self, holder: str, requests: list[tuple[Any, ...]], sent: int = 0) -> list[Packed]:
        """Many arrivals in one message. What is decided at once is answered, None stands for a request that waits.

        Its answer is kept until the caller takes it with `acquire` under the same id, or gives up with `settle`.
        Requests and answers travel as bare tuples, see `parked.packed`. `sent` is the number of the holder's message,
        see `HolderState`.
        """
        answers = self._arrivals(holder, requests, sent)
        decisions = [packed(answer) for answer in answers]
        for request, decision in zip(requests, decisions, strict=True):
            if decision is not None:
                self._parked.take(request[0])
        return decisions

    async def settle(self, settled: list[Settled]) -> None:
        """Give leases back, each by its request and generation; with None the client has left, wherever it stood."""
        self._settle(settled)

    def _settle(self, settled: list[Settled]) -> None:
        for request, generation, _ in settled:
            if generation is not None:
                self._post(LeaseReleased(request, generation))
                continue
            self._post(RequestCancelled(request))
            self._parked.cancel(request)
        for request, _, outcome in settled:
            if outcome is not None:
                self._ended(request, outcome)

    def _ended(self, request: str, outcome: Outcome) -> None:
        self._counts.ended(outcome)
        self._watch.ended(request, outcome)

    async def lease_address(self, node: str) -> Address | None:
        """Where a holder on a node connects to take its leases; None where it cannot, and calls `acquire_now`."""
        _, here = effects.this_actor()
        home = await asyncio.to_thread(home_of, effects.raylet_pid())
        return await self._leases.address_for(node, here, home.folder, effects.open_host)

    async def waiting(self, request: str) -> Place | None:
        """Where a request waits; None when it does not."""
        place = self._ledger.queue_position(request)
        if place is None:
            return None
        state, where = place
        return Place(state, where, self._load_progress(str(where)) if state == "loading" else None)

    def _load_progress(self, model: str) -> float | None:
        """How far the replica of a model has come that will be loaded first; None where none has said."""
        known = self._attached.progress.items()
        return max((fraction for replica, fraction in known if self._ledger.model_of(replica) == model), default=None)

    # --- replicas -----------------------------------------------------------------------------------------------

    async def attach_replica(self, state: ReplicaState) -> None:
        """Announce a replica. Parks for as long as both live, so that this ledger's end is an event for the caller.

        In the first seconds of a later life it may return early: the replica is then to announce itself again, with
        what has become of it meanwhile.
        """
        if self._ledger.is_recovering and state.model not in self._config.spec.models:
            # Registered at run time: this life has not heard of it yet.
            await self._changed.until(lambda: not self._ledger.is_recovering or state.model in self._config.spec.models)
            return
        self._attached.add_replica(state)
        busy = state.loading or state.engine is not None or state.failed is not None
        asleep = None if state.asleep is None else (state.asleep.host_mib, state.asleep.device_mib)
        told = (state.model, state.replica, state.node, state.started_at, busy, state.devices, state.unloading)
        self._post(ReplicaStarted(*told, state.stopping, state.booked, state.host_mib, asleep))
        if state.failed is not None:
            self._post(ReplicaFailed(state.replica, state.failed))
        elif state.engine is not None:
            self._engine_ready(state.replica, state.engine)
        await self._park_while_alive(state.actor_id)

    async def orders(self, replica: str, seen: int, timeout_s: float = 30.0) -> tuple[int, Order | None]:
        """The order to a replica once it is another than the one of the version seen; parks until then."""
        return await self._attached.orders.after(replica, seen, timeout_s)

    async def replica_progress(self, replica: str, fraction: float) -> None:
        """How much of a replica's load is done, 0.0 to 1.0; for people to see, nothing is decided by it."""
        self._attached.progress[replica] = fraction
        self._watch.progress(replica, fraction)

    async def replica_ready(self, replica: str, engine: EngineState) -> None:
        """The engine of a replica serves now."""
        self._engine_ready(replica, engine)

    async def replica_failed(self, replica: str, reason: str) -> None:
        """The engine of a replica could not be loaded."""
        self._attached.engine_ended(replica)
        self._post(ReplicaFailed(replica, reason))

    async def engine_died(self, replica: str, reason: str) -> None:
        """The engine process of a replica is confirmed dead; the replica lives."""
        self._attached.engine_ended(replica)
        self._post(EngineDied(replica, reason))

    async def engine_unloaded(self, replica: str) -> None:
        """The engine process of a replica has ended as ordered; the replica stays."""
        self._attached.engine_ended(replica)
        self._post(EngineUnloaded(replica))

    async def conversations_saved(self, replica: str, saved_bytes: int) -> None:
        """The engine of a replica has saved so much of its conversations at its end; counted, nothing more."""
        model = self._ledger.model_of(replica)
        if model is not None:
            self._counts.kv_saved_bytes[model] += saved_bytes

    async def engine_asleep(self, replica: str, host_mib: int, device_mib: int) -> None:
        """The engine of a replica sleeps and holds so much of the host's memory, and of each of its devices."""
        self._attached.engine_asleep(replica, AsleepState(host_mib, device_mib))
        self._post(EngineAsleep(replica, host_mib, device_mib))

    async def replica_stopping(self, replica: str) -> None:
        """Serve has told a replica to stop; what runs on it may end."""
        self._post(ReplicaStopping(replica))

    async def replica_suspected(self, replica: str) -> None:
        """A holder saw the engine of a replica hang."""
        self._post(ReplicaSuspected(replica))

    # --- ingresses ----------------------------------------------------------------------------------------------

    async def attach_holder(self, state: HolderState) -> None:
        """Announce an ingress with its configuration, its leases and its waiting requests. Parks like a replica's."""
        self._attached.add_holder(state)
        self._meet(state.configuration)
        self._close_window()
        for lease in state.leases:
            self._post(
                LeaseReannounced(
                    lease.request, lease.holder, lease.model, lease.replica, lease.generation, slots=len(lease.slots)
                )
            )
        self._announced(state)
        await self._park_while_alive(state.actor_id)

    async def holder_alive(self, state: HolderState) -> None:
        """What an attached ingress holds and waits for now, said from time to time: ends what a lost message left."""
        if self._attached.has_holder(state):
            self._announced(state)

    async def config(self, seen: tuple[float, int], timeout_s: float = 30.0) -> Configuration:
        """The configuration, once it is newer than the version seen, or after the time. Parks until then."""
        await self._changed.until(lambda: self._config.current.version > seen, timeout_s)
        return self._config.current

    async def replace_config(self, expected: tuple[float, int], configuration: Configuration) -> Configuration:
        """Put a changed configuration in force, if the one it was made from still is; the one in force afterwards.

        Two callers may make different changes of the same version: whose it is, the whole answer tells.
        """
        await self._recovered()
        if self._config.replace(expected, configuration):
            self._config_changed()
        return self._config.current

    async def server_lost(self, url: str) -> None:
        """A request lost its external server, before or in its answer: look at once whether it is still there."""
        self._post(ServerSuspected(url))
        if self._servers is not None:
            self._servers.check_now(url)

    # --- Serve and operators ------------------------------------------------------------------------------------

    async def desired(self, seen_version: int, timeout_s: float = 30.0) -> tuple[int, dict[str, int]]:
        """How many replicas of each model should exist. Parks until that differs from the version already seen."""
        await self._changed.until(
            lambda: not self._ledger.is_recovering and self._desired_version != seen_version, timeout_s
        )
        return self._desired_version, dict(self._desired)

    async def load(
        self, model: str, replicas: int, overrides: Mapping[str, Any] | None = None, again: bool = False
    ) -> Ended:
        """Load so many replicas, all or none. Parks until they are ready, refused, or have failed and are gone.

        `overrides` are engine keys for this load only. They are refused, and the model stays as it is, where it is
        loaded or being loaded. `again`: the caller asks for what an earlier life of the ledger was asked already.
        """
        await self._recovered()
        in_force = dict(self._config.current.overrides.get(model, {}))
        changes = bool(overrides) and not (again and in_force == overrides)
        if changes:
            refusal = refuse_overrides(model, self._ledger.model(model), replicas, self._config.spec.models.get(model))
            if refusal is not None:
                return refusal
            try:
                self._config.override(model, overrides)
            except ConfigError as error:
                return LoadRefused(model, "InvalidRequest", str(error), {"code": "invalid_load_request"})
            # In one step with the order itself, or the overrides would end as those of a model that nobody loads.
            self._config_changed(keep_overrides=True)
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

    async def status(self) -> Snapshot:
        """The ledger's life, with what only its actor knows of replicas and time."""
        return self._snapshot()

    def _snapshot(self) -> Snapshot:
        now = time.monotonic()
        snapshot = self._ledger.snapshot()
        return dataclasses.replace(
            snapshot,
            replicas=tuple(self._attached.described(row) for row in snapshot.replicas),
            now=now,
            time=time.time(),
            stalled=watchdog.stalled(snapshot, self._moved_at, now, watchdog.limit_s(self._config.spec)),
            totals=self._counts.totals(),
        )

    async def changes(self, epoch: str, version: int, timeout_s: float = 30.0, limit: int = BATCH) -> Changes:
        """What happened behind the entry that the caller has seen; parks until something does, or `timeout_s`."""
        return await self._watch.follow(epoch, version, timeout_s, limit, self._snapshot)

    async def metrics(self) -> bytes:
        """All figures as Prometheus text."""
        return prometheus.render(self._counts, self._snapshot())

    async def check(self) -> str | None:
        """The first broken invariant in words, or None."""
        try:
            self._ledger.check()
        except AssertionError as error:
            return str(error) or "an invariant is broken"
        return None

    # --- inside -------------------------------------------------------------------------------------------------

    def _arrivals(self, holder: str, requests: Sequence[Sequence[Any]], sent: int) -> list[Answer]:
        self._attached.has_sent(holder, sent)
        return [self._arrive(holder, Request(*request)) for request in requests]

    def _arrive(self, holder: str, request: Request) -> Answer:
        """The answer to a request, which has arrived now or before."""
        answer = self._parked.find(request.id)
        if answer is None:
            answer = self._parked.park(request.id, holder, request.trace)
            self._post(
                RequestArrived(
                    request.id,
                    holder,
                    request.model,
                    request.priority,
                    time.monotonic() + request.timeout_s,
                    request.keep_alive_s,
                    request.slots,
                    request.principal,
                    request.is_patient,
                )
            )
            if not answer.done():
                answer.add_done_callback(partial(self._count_refusal, request))
            elif isinstance(answer.result(), Reject):
                self._count_refusal(request, answer)
        return answer

    def _count_refusal(self, request: Request, answer: Answer) -> None:
        """A request ends here if it is refused, or its client has left; a granted one ends with its lease."""
        decided = None if answer.cancelled() else answer.result()
        if not isinstance(decided, Grant):
            self._ended(request.id, refused(request, decided))

    def _engine_ready(self, replica: str, engine: EngineState) -> None:
        self._attached.engine_ready(replica, engine)
        told = (engine.memory_mib, engine.address, engine.devices, engine.slots, engine.revision or None)
        self._post(ReplicaReady(replica, *told))

    # --- lives and deaths ---------------------------------------------------------------------------------------

    def _announced(self, state: HolderState) -> None:
        """Give up what this holder has neither told of now nor asked for since."""
        if self._attached.is_overtaken(state):
            return
        leases = tuple((lease.request, lease.generation) for lease in state.leases)
        self._post(HolderAnnounced(state.holder, leases, state.waiting))
        self._parked.cancel_all_but(state.holder, {*state.waiting, *(lease.request for lease in state.leases)})

    async def _park_while_alive(self, actor_id: str) -> None:
        if await effects.is_dead(actor_id):
            self._on_actor_dead(actor_id)
        # What waits on for one that is gone would keep its connection open.
        await self._attached.until_gone(actor_id)

    def _on_actor_dead(self, actor_id: str) -> None:
        replica, holder = self._attached.remove(actor_id)
        if replica is not None:
            self._post(ReplicaGone(replica))
        if holder is not None:
            self._post(HolderDied(holder))
            self._parked.cancel_all_but(holder, ())

    def _use(self) -> watches.Use:
        pool = self._config.current.pool
        return watches.Use(pool.mem_budget_mb, pool.kv_store, pool.max_asleep != 0, self._attached.has_pool())

    def _nodes_changed(self, nodes: dict[str, NodeSpec]) -> None:
        self._post(NodesChanged(nodes))
