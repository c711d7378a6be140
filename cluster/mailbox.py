"""The mailbox around the ledger: the one way of an event into it, and of its commands out of it.

It owns the ledger, the configuration that is in force, the calls parked until their request is granted, the orders to
replicas, and one timer. Every method does its work in one step of the event loop, so the ledger is never seen
half-changed. It must never wait for anything while it decides. An exception inside the ledger ends this life of it:
the next one learns everything anew, which is tested, while nobody knows what a half-changed book would do.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Sequence
from typing import Any

from cluster import effects
from cluster.attached import Attached
from cluster.changes import Watch
from cluster.config.version import Configuration
from cluster.ledger.events import (
    ConfigChanged,
    EndReplica,
    EngineAsleep,
    EngineDied,
    EngineUnloaded,
    Grant,
    LeaseReleased,
    LoadEngine,
    LoadRequested,
    PrefetchModel,
    Reject,
    ReplicaFailed,
    ReplicaGone,
    ReplicaReady,
    ReplicaStarted,
    RestartEngine,
    SetDesired,
    SleepEngine,
    Ticked,
    UnloadEngine,
    WakeEngine,
)
from cluster.ledger.ledger import Ledger
from cluster.metrics import Counts
from cluster.operator_calls import OperatorCalls
from cluster.orders import Prefetch, Sleep, Unload, Wake
from cluster.owned_config import OwnedConfiguration
from cluster.parked import ParkedCalls
from cluster.waiting import Signal

logger = logging.getLogger("slotpool.ledger")

#: How long a new life of the ledger collects announcements before it decides anything, in seconds. Replicas and
#: ingresses notice the death of its former life within milliseconds and come back within the actor's restart.
RECOVERY_S = 2.0
#: A new life begins with the configuration that its actor was first made with, which may be weeks old. So it goes on
#: listening until an ingress has announced the one it has, and until every replica that runs has said what it holds:
#: one that came later would find its devices given to another. But no longer than this, in seconds.
RECOVERY_LIMIT_S = 15.0
#: How often a new life looks whether a replica that is missing has died, in seconds.
LOOK_S = 0.5

#: Events that are progress by themselves, whatever the ledger decides about them.
_PROGRESS = (
    LeaseReleased,
    ReplicaStarted,
    ReplicaReady,
    ReplicaFailed,
    ReplicaGone,
    EngineDied,
    EngineUnloaded,
    EngineAsleep,
)


class Mailbox:
    """One life of the ledger, and what its decisions set in motion."""

    def __init__(self, configuration: Configuration) -> None:
        now = time.monotonic()
        self.epoch = uuid.uuid4().hex[:12]
        self._config = OwnedConfiguration(configuration)
        self._born_at = now
        recovering_until = now + RECOVERY_LIMIT_S if effects.was_restarted() else None
        # A later life was made with the configuration of the first, which says nothing of what runs by now: the
        # newest comes with an ingress, within the window.
        self._ledger = Ledger(
            self._config.spec,
            epoch=self.epoch,
            now=now,
            recovering_until=recovering_until,
            configured=recovering_until is None,
            patience_s=0.0,
        )
        self._parked = ParkedCalls()
        self._attached = Attached()
        self._operators = OperatorCalls(self._ledger)
        self._counts = Counts(self._ledger.knows)
        self._watch = Watch(self._ledger, self._counts, trace_of=self._parked.trace_of)
        self._moved_at = now
        self._desired: dict[str, int] = {}
        self._desired_version = 0
        self._changed = Signal()
        self._recovering = self._ledger.is_recovering
        self._misses_replicas = self._recovering
        self._due: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._servers: Any = None
        self._follow_servers()

    def _post(self, event: Any, *, keep_overrides: bool = False) -> list[Any]:
        """The one way of an event into the ledger and of its commands out of it."""
        now = time.monotonic()
        try:
            commands = self._ledger.decide(event, now)
            due = self._ledger.next_deadline()
        except Exception:
            logger.critical("the ledger failed on %r; this life of it ends", event, exc_info=True)
            effects.end_process()
            raise
        try:
            self._watch.decided(event)
        except Exception:
            # Whoever only looks on must not keep a decision from being carried out.
            logger.exception("the change log missed %r", event)
        if isinstance(event, _PROGRESS) or any(type(command) is not Reject for command in commands):
            self._moved_at = now
        if due != self._due or self._timer is None:
            self._arm_timer(due)
        self._carry_out(commands)
        if self._recovering and not self._ledger.is_recovering:
            self._recovering = False
            self._changed.fire()
        # What a new order is told concerns its own caller alone.
        self._operators.review(() if isinstance(event, LoadRequested) else commands)
        if self._config.current.overrides and not keep_overrides:
            self._end_overrides()
        return commands

    def _carry_out(self, commands: Sequence[Any]) -> None:
        rescaled = False
        for command in commands:
            if isinstance(command, Grant | Reject):
                self._answer(command)
            elif isinstance(command, SetDesired):
                self._desired[command.model] = command.replicas
                rescaled = True
            else:
                self._order(command)
        if rescaled:
            self._desired_version += 1
            self._changed.fire()

    def _order(self, command: Any) -> None:
        """What a command tells a replica to do; nothing if it is of another kind."""
        orders = self._attached.orders
        match command:
            case LoadEngine() if command.model in self._config.spec.models:
                orders.give(command.replica, self._config.load(command.model, command.devices))
            case UnloadEngine():
                orders.give(command.replica, Unload("its room is needed"))
            case SleepEngine():
                orders.give(command.replica, Sleep())
            case WakeEngine():
                orders.give(command.replica, Wake(command.devices))
            case PrefetchModel() if command.model in self._config.spec.models:
                orders.give(command.replica, Prefetch(command.model, self._config.load(command.model, ()).config))
            case RestartEngine():
                self._attached.restart_engine(command.replica)
            case EndReplica():
                self._attached.end_replica(command.replica, "it does not do what it was ordered")

    def _answer(self, answer: Grant | Reject) -> None:
        if not self._parked.decide(answer) and isinstance(answer, Grant):
            # Nobody waits for this grant any more: its caller vanished between the two events.
            logger.warning("grant %s has no taker, released", answer.request)
            self._post(LeaseReleased(answer.request, answer.generation))

    def _arm_timer(self, due: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._due = due
        if due is not None:
            self._timer = asyncio.get_event_loop().call_later(max(0.001, due - time.monotonic()), self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._post(Ticked())

    async def _recovered(self) -> None:
        """Wait until this life of the ledger knows what the former one left."""
        await self._changed.until(lambda: not self._ledger.is_recovering)

    async def _find_replicas(self) -> None:
        """Wait for the replicas that a former life has left, as long as this one still listens."""
        if not self._misses_replicas:
            return
        try:
            while self._ledger.is_recovering:
                missing = await effects.living_replicas() - self._attached.replicas.keys()
                if not missing:
                    break
                logger.info("waiting for replicas to announce themselves: %s", ", ".join(sorted(missing)))
                await asyncio.sleep(LOOK_S)
        except Exception:
            logger.exception("could not see which replicas run; those that come late may find their devices taken")
        self._misses_replicas = False
        self._close_window()
        self._post(Ticked())

    def _close_window(self) -> None:
        """End the recovery, when there is nobody left to be heard."""
        if self._attached.has_holders and not self._misses_replicas:
            self._ledger.recover_until(max(self._born_at + RECOVERY_S, time.monotonic()))

    # --- configuration ------------------------------------------------------------------------------------------

    def _meet(self, announced: Configuration) -> None:
        if self._config.meet(announced) or self._ledger.awaits_configuration:
            self._config_changed()

    def _config_changed(self, *, keep_overrides: bool = False) -> None:
        self._post(ConfigChanged(self._config.spec), keep_overrides=keep_overrides)
        self._follow_servers()
        self._changed.fire()

    def _end_overrides(self) -> None:
        """Overrides hold for one load: they end when nothing of their model is left, and nobody has ordered it."""
        if self._ledger.is_recovering:
            return
        for model in list(self._config.current.overrides):
            view = self._ledger.model(model)
            if (view is None or not (view.replicas or view.ordered)) and self._config.override(model, None):
                self._config_changed()

    def _follow_servers(self) -> None:
        """Read the manifests of the configured external servers from now on."""
        if self._servers is None and self._config.spec.servers:
            # Imports an HTTP client, which a pool without servers does without.
            from cluster.servers.manifests import ManifestWatch

            self._servers = ManifestWatch(self._post)
        if self._servers is not None:
            self._servers.follow(self._config.spec.servers)
