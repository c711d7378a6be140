"""The ledger: who may run, and where. Events in, commands out; no Ray, no asyncio, no clock of its own.

    ledger = Ledger(spec, epoch="e1", now=0.0)
    commands = ledger.decide(RequestArrived("r1", "ingress-1", "smollm2", 2, deadline=60.0), now=0.0)
    # [SetDesired("smollm2", 1)] … and, once a replica has announced itself and is ready, [Grant("r1", …)]

`decide` is synchronous and deterministic: the same events at the same times give the same commands. An
event that is malformed, stale, repeated or of somebody unknown is logged and changes nothing. The caller sends
`Ticked` when `next_deadline()` has come, and carries the commands out in order.

Where things are: `states` the transition table · `records`, `pool` the books · `requests`, `holders`, `replicas`,
`engines`, `operators` what each event does to them · `early` what comes before the configuration · `tree` the decision
tree, with `placing`, `promises`, `eviction`, `victims`, `autoscale`, `policy`, `placement` · `servers`,
`server_events`, `server_turns` external servers · `queue` lines and deadlines · `checks` the invariants ·
`snapshot` what is shown.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

from cluster.ledger import snapshot, tree
from cluster.ledger.books import checks
from cluster.ledger.books.pool import Pool
from cluster.ledger.books.queue import INFINITY
from cluster.ledger.events import (
    Command,
    ConfigChanged,
    EngineAsleep,
    EngineDied,
    EngineUnloaded,
    Event,
    HolderAnnounced,
    HolderDied,
    LeaseReannounced,
    LeaseReleased,
    LoadRequested,
    NodesChanged,
    ReplicaFailed,
    ReplicaGone,
    ReplicaReady,
    ReplicaStarted,
    ReplicaStopping,
    ReplicaSuspected,
    RequestArrived,
    RequestCancelled,
    ServerManifest,
    ServerSuspected,
    Ticked,
    UnloadRequested,
)
from cluster.ledger.handlers import (
    early,
    engines,
    holders,
    machines,
    operators,
    replicas,
    requests,
    server_events,
    server_slots,
)
from cluster.ledger.handlers.validate import fault
from cluster.ledger.rules import estimate
from cluster.ledger.specs import PoolSpec
from cluster.ledger.transitions import Transition

log = logging.getLogger(__name__)


def _ticked(pool: Pool, event: Ticked, now: float) -> None:
    """Time alone has done it: `decide` acts on what is due before any event."""


_HANDLERS: dict[type[Any], Callable[[Pool, Any, float], None]] = {
    RequestArrived: requests.request_arrived,
    RequestCancelled: requests.request_cancelled,
    LeaseReleased: requests.lease_released,
    HolderDied: holders.holder_died,
    HolderAnnounced: holders.holder_announced,
    LeaseReannounced: holders.lease_reannounced,
    ReplicaStarted: replicas.replica_started,
    ReplicaReady: replicas.replica_ready,
    ReplicaFailed: replicas.replica_failed,
    EngineDied: engines.engine_died,
    EngineUnloaded: engines.engine_unloaded,
    EngineAsleep: engines.engine_asleep,
    ReplicaSuspected: engines.replica_suspected,
    ReplicaStopping: replicas.replica_stopping,
    ReplicaGone: replicas.replica_gone,
    NodesChanged: machines.nodes_changed,
    ConfigChanged: operators.config_changed,
    LoadRequested: operators.load_requested,
    UnloadRequested: operators.unload_requested,
    ServerManifest: server_events.server_manifest,
    ServerSuspected: server_events.server_suspected,
    Ticked: _ticked,
}
# In a pool with external servers an event may be about a lease on one of them.
_WITH_SERVERS: dict[type[Any], Callable[[Pool, Any, float], None]] = {
    **_HANDLERS,
    RequestArrived: server_events.request_arrived,
    RequestCancelled: server_events.request_cancelled,
    LeaseReleased: server_events.lease_released,
    HolderDied: server_events.holder_died,
    HolderAnnounced: server_events.holder_announced,
    LeaseReannounced: server_events.lease_reannounced,
}


class Ledger:
    """The pure ledger. Not thread-safe: it has one owner, who posts events to it.

    `epoch` names this life of the ledger. With `recovering_until`, the first life's successor listens until then:
    running replicas and leases are announced and adopted, arrivals wait, nothing is started, evicted or stopped, and
    no `SetDesired` is sent; when the window closes every model's desired count is said once.

    Not `configured`, the window stays open until the first `ConfigChanged`, and `patience_s` beyond its end at most;
    until then nothing is judged by `spec`, which may be old: what is heard is kept, and told to the ledger afterwards.
    """

    def __init__(
        self,
        spec: PoolSpec,
        *,
        epoch: str,
        now: float,
        recovering_until: float | None = None,
        configured: bool = True,
        patience_s: float = early.PATIENCE_S,
    ) -> None:
        self._pool = Pool(spec, epoch, now, recovering_until)
        operators.config_changed(self._pool, ConfigChanged(spec), now)
        machines.nodes_changed(self._pool, NodesChanged(spec.nodes), now)
        if not configured:
            early.await_configuration(self._pool, patience_s)

    @property
    def epoch(self) -> str:
        return self._pool.epoch

    @property
    def is_recovering(self) -> bool:
        return self._pool.is_recovering

    @property
    def awaits_configuration(self) -> bool:
        """Nothing but a `ConfigChanged` is wanted now: all else is kept until one has come, or patience has ended."""
        return self._pool.early is not None

    @property
    def desired(self) -> dict[str, int]:
        """How many replicas of each model should exist. Not to be acted upon while `is_recovering`."""
        return {name: model.desired for name, model in self._pool.models.items()}

    def decide(self, event: Event, now: float) -> list[Command]:
        """What to do about an event. Mutates; never blocks; logs what it ignores.

        Never raises, whatever the event: an exception that comes out of here is a mistake in the ledger, which may be
        half-changed. Nothing is caught inside. The owner must end its process then, so that the next life recovers
        from what everybody announces.

        A clock that goes back is taken to stand still. Whatever is due by `now` is done first, so a late `Ticked`
        loses nothing. Where very much is due at once (hundreds of deadlines or timers, thousands of replicas to be
        looked at as victims, or of requests of a dead holder), a part is done, and `next_deadline` stays in the past
        until the next events have done the rest.
        """
        pool = self._pool
        wrong = fault(event)
        if wrong is not None or not -INFINITY < now < INFINITY:
            log.error("event %r ignored: %s", event, wrong or f"now is {now!r}")
            return []
        if now > pool.now:
            pool.now = now
        else:
            now = pool.now
        out: list[Command] = []
        pool.out = out
        if pool.transitions:
            pool.transitions = []
        if pool.early is not None and self._listens(event, now):
            return out
        if now >= pool.wake:
            tree.expire(pool, now)
        if pool.servers.known:
            _WITH_SERVERS[type(event)](pool, event, now)
            server_slots.dispatch(pool, now)
        else:
            _HANDLERS[type(event)](pool, event, now)
        if pool.touched or pool.went_idle or pool.changed:
            tree.settle(pool, now)
        return out

    @property
    def transitions(self) -> list[Transition]:
        """What the last decision changed, in order; for those who watch."""
        return self._pool.transitions

    def _listens(self, event: Event, now: float) -> bool:
        """Without a configuration: whether an event needs nothing more now. Tells what was kept once there is one."""
        pool = self._pool
        early.refuse_late(pool, now)
        assert pool.recovering_until is not None, "events are kept in the recovery window only"
        if now >= pool.recovering_until:
            for each in early.take(pool, now, configured=False):
                self._handle(each, now)
            return False
        if type(event) is not ConfigChanged:
            return early.keep(pool, event)
        self._handle(event, now)
        for each in early.take(pool, now, configured=True):
            self._handle(each, now)
        return True

    def _handle(self, event: Event, now: float) -> None:
        (_WITH_SERVERS if self._pool.servers.known else _HANDLERS)[type(event)](self._pool, event, now)

    def next_deadline(self) -> float | None:
        """When to send the next `Ticked`; None if time alone changes nothing."""
        pool = self._pool
        first, _ = pool.next_deadline()
        times = [first] if first < INFINITY else []
        if pool.left_behind:
            times.append(pool.now)
        if pool.recovering_until is not None:
            times.append(min(pool.recovering_until, pool.early_deadline))
        elif pool.is_behind:
            times.append(pool.now)
        else:
            times += [each for each in (tree.next_due(pool), pool.quiet_at) if each is not None and each < INFINITY]
        return min(times, default=None)

    def recover_until(self, until: float) -> None:
        """Move the end of the recovery window; what it decides then comes with the next event. Later: nothing."""
        pool = self._pool
        if pool.recovering_until is not None:
            pool.recovering_until = until
            pool.wake = min(pool.wake, until)

    def queue_position(self, request: str) -> tuple[str, int | str] | None:
        """("queued", 1-based position), ("loading", model), or None if the request does not wait."""
        return snapshot.queue_position(self._pool, request)

    def expected_wait_s(self, model: str, priority: int, now: float) -> float | None:
        """How long a request that came now would probably wait for a slot, in s; None if there is no such model."""
        known = self._pool.models.get(model)
        return None if known is None else estimate.wait_s(self._pool, known, priority, now)

    def model(self, name: str) -> snapshot.ModelView | None:
        """One model at a glance; None if there is none of that name. Cheap."""
        return snapshot.view(self._pool, name)

    def knows(self, model: str) -> bool:
        """Whether there is a model, or a public name of several, called so."""
        return model in self._pool.models or model in self._pool.spec.variants

    def briefs(self, models: Iterable[str] | None = None) -> dict[str, snapshot.Brief]:
        """What changes from request to request, of these models if they are there; or of all, in a pass over them."""
        return snapshot.briefs(self._pool, models)

    def servers(self) -> tuple[snapshot.ServerRow, ...]:
        """The external servers as they stand."""
        return snapshot.servers(self._pool)

    def model_of(self, replica: str) -> str | None:
        """The model of a running replica; None if it is not known."""
        known = self._pool.replicas.get(replica)
        return None if known is None else known.model.name

    def snapshot(self) -> snapshot.Snapshot:
        """The whole state as plain immutable data."""
        return snapshot.take(self._pool)

    def check(self) -> None:
        """Raise `AssertionError` with a precise message if an invariant is broken."""
        checks.check(self._pool)
        snapshot.check(self._pool)

    def __repr__(self) -> str:
        return snapshot.describe(self._pool)
