"""What the ledger shows of itself: for the status route, for keep-alive comments, for the debugger.

A snapshot is immutable and plain: whoever shows it holds no part of the books.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from cluster.ledger.books.queue import INFINITY
from cluster.ledger.books.servers import is_remote
from cluster.ledger.rules import policy
from cluster.ledger.states import ReplicaState

if TYPE_CHECKING:
    from cluster.ledger.books.pool import Pool
    from cluster.ledger.books.records import Claim, Model, Replica
    from cluster.ledger.books.servers import Server

_STATE_NAMES = [state.name for state in ReplicaState]


class ModelView(NamedTuple):
    """What an operator's call waits for, of one model. `ordered`: a load is under way as a whole.

    `replicas` counts all that have devices, down to those whose engine is still to end; `leaving` only these last.
    """

    state: str
    ready: int
    replicas: int
    leaving: int
    ordered: bool
    unloading: bool
    held_down: bool
    failures: int
    last_error: str | None


class ReplicaRow(NamedTuple):
    """One replica. `replica` is None as long as no process has announced itself; `since` is when its state began.

    `devices` are those that it was assigned, none while its engine sleeps; `visible_devices` those that its engine's
    process says it has, None if it has not said so. `record` numbers the records of one life of the ledger, as in
    `transitions.Moved`. `used` slots are leased: a lease may have several.

    What only the actor knows, it fills in: `pid` of the process that holds the engine, `url` of the server that it is
    in if it is in one, `started_at` of the replica (seconds since 1970), and `progress` of the load, 0.0 to 1.0, while
    it loads.
    """

    model: str
    replica: str | None
    state: str
    slots: int
    leases: int
    node: str
    since: float
    record: int = 0
    used: int = 0
    devices: tuple[int, ...] = ()
    visible_devices: tuple[str, ...] | None = None
    pid: int | None = None
    url: str | None = None
    started_at: float | None = None
    progress: float | None = None


@dataclass(frozen=True, slots=True)
class SwapRow:
    """Room that is promised to a model as soon as these replicas have left; the rest as in `transitions.Because`."""

    victims: tuple[str, ...]
    reason: str
    waiter: str | None
    cost_s: float | None


@dataclass(frozen=True, slots=True)
class ModelRow:
    """One model. `state` is its best replica's in the admin route's words; `loading` is an operator's load under way.

    `memory_mib` is what a replica was measured to take, `memory_estimated_mib` what the configuration says of it.
    `asleep` is how many of its replicas are kept without a loaded engine. `since_by_class` is when the first who waits
    in each class came, `bound_at` when the first of their bounds is reached, `drain_s` how long its drains take.
    """

    state: str = "unloaded"
    remote: bool = False
    queued: int = 0
    queued_by_class: tuple[int, int, int] = (0, 0, 0)
    leases: int = 0
    waiting_since: float | None = None
    last_arrival: float | None = None
    desired: int = 0
    ready: int = 0
    last_error: str | None = None
    load_s: float | None = None
    memory_mib: int | None = None
    memory_estimated_mib: int | None = None
    pinned: bool = False
    backoff_until: float | None = None
    loading: bool = False
    asleep: int = 0
    since_by_class: tuple[float | None, float | None, float | None] = (None, None, None)
    bound_at: float | None = None
    drain_s: float | None = None
    swap: SwapRow | None = None

    @property
    def status(self) -> str:
        """Its state in the words of `/v1/models`, where an unloaded model whose replica is kept sleeps."""
        return "sleeping" if self.state == "unloaded" and self.asleep else self.state


@dataclass(frozen=True, slots=True)
class ServerRow:
    """One external server; it offers nothing while its manifest cannot be read."""

    url: str
    available_models: tuple[str, ...] = ()
    active_requests: int = 0
    max_concurrent: int = 1
    current_model: str | None = None
    is_busy: bool = False
    is_up: bool = False
    last_refresh_error: str | None = None


@dataclass(frozen=True, slots=True)
class NodeRow:
    """One machine of the cluster. Memory is what models may take of it, in MiB; 0 = unknown, not limited."""

    name: str
    gpus: int = 0
    memory_mib: int = 0
    device_memory_mib: int = 0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that the ledger shows. Its times (what ends in `since`, `_at`, `_until` or `_arrival`) are on its clock.

    `overloaded`: somebody waits longer than his class's bound.

    `gpus` is how many devices all machines have together.

    The actor fills in what that clock shows (`now`), the time of day with it (`time`), why the pool is stuck, and what
    it has counted in this life: `totals` has `requests`, `prompt_tokens` and `output_tokens`.
    """

    epoch: str
    recovering: bool = False
    overloaded: bool = False
    leases: int = 0
    queued: int = 0
    submitted: int = 0
    finished: int = 0
    rejected: int = 0
    gpus: int = 0
    replicas: tuple[ReplicaRow, ...] = ()
    models: dict[str, ModelRow] = field(default_factory=dict)
    servers: tuple[ServerRow, ...] = ()
    nodes: tuple[NodeRow, ...] = ()
    now: float = 0.0
    time: float = 0.0
    stalled: str | None = None
    totals: dict[str, int] = field(default_factory=dict)


def view(pool: Pool, name: str) -> ModelView | None:
    """One model at a glance; None if there is none of that name."""
    model = pool.models.get(name)
    if model is None:
        return None
    return ModelView(
        state=state(model),
        ready=model.counts[ReplicaState.READY],
        replicas=model.placed,
        leaving=sum(1 for each in model.placed_replicas() if each.state.is_leaving),
        ordered=model.order is not None,
        unloading=model.unloading,
        held_down=model.held_down,
        failures=model.failures,
        last_error=model.last_error,
    )


#: Since when nobody waits in any class.
NOBODY = (None, None, None)


class Use(NamedTuple):
    """How much of a replica that serves, or drains, is in use."""

    record: int
    leases: int
    used: int
    slots: int


class Brief(NamedTuple):
    """What changes from request to request, or from load to load, of one model; as in `ModelRow`."""

    state: str
    ready: int
    leases: int
    queued_by_class: tuple[int, int, int]
    last_error: str | None
    since_by_class: tuple[float | None, float | None, float | None] = (None, None, None)
    bound_at: float | None = None
    remote: bool = False
    pinned: bool = False
    memory_mib: int | None = None
    load_s: float | None = None
    drain_s: float | None = None
    uses: tuple[Use, ...] = ()


def briefs(pool: Pool, names: Iterable[str] | None = None) -> dict[str, Brief]:
    """What changes from request to request, of these models that are there, or of all."""
    on_servers = Counter(lease.model for lease in pool.servers.leases.values())
    models = pool.models if names is None else {name: pool.models[name] for name in names if name in pool.models}
    return {name: _brief(pool, model, on_servers[name]) for name, model in models.items()}


def _brief(pool: Pool, model: Model, on_servers: int) -> Brief:
    best = state(model)
    remote = pool.servers.state(model.name) if best in ("unloaded", "failed") else None
    high, medium, low = model.queue.counts
    ready = model.counts[ReplicaState.READY]
    since, bound_at = _waits(pool, model) if model.queue.count else (NOBODY, None)
    uses = _uses(model) if ready or model.counts[ReplicaState.DRAINING] else ()
    leases, counts = model.leased + on_servers, (high, medium, low)
    learned = (model.measured_mib, model.load_s, model.drain_s or None)
    waits = (counts, model.last_error, since, bound_at)
    return Brief(remote or best, ready, leases, *waits, is_remote(model), model.is_pinned, *learned, uses)


def _uses(model: Model) -> tuple[Use, ...]:
    """Made anew only if something has changed: this is asked for with every change of any replica."""
    uses = model.uses
    if uses is None:
        uses = model.uses = _uses_now(model)
    return cast(tuple[Use, ...], uses)


def _uses_now(model: Model) -> tuple[Use, ...]:
    serving = [each for each in model.replicas if each.state.may_hold_leases]
    return tuple([Use(each.serial, len(each.leases), each.used, each.slots) for each in serving])


def _waits(pool: Pool, model: Model) -> tuple[tuple[float | None, float | None, float | None], float]:
    """Since when the first of each class waits, and when the first of their bounds is reached."""
    heads = {head.priority: head.arrived for head in model.queue.heads()}
    first = min(arrived + policy.bound_s(pool, model, priority) for priority, arrived in heads.items())
    return (heads.get(1), heads.get(2), heads.get(3)), first


def take(pool: Pool) -> Snapshot:
    """The whole state. Changes nothing; costs a pass over all models and replicas."""
    models = briefs(pool)
    return Snapshot(
        epoch=pool.epoch,
        recovering=pool.is_recovering,
        overloaded=any(each.bound_at is not None and pool.now > each.bound_at for each in models.values()),
        leases=len(pool.leases) + len(pool.servers.leases),
        queued=len(pool.waiters),
        submitted=pool.submitted,
        finished=pool.finished,
        rejected=pool.rejected,
        gpus=sum(node.spec.gpus for node in pool.book.nodes.values() if node.present),
        replicas=tuple(_row(replica) for model in pool.models.values() for replica in model.replicas),
        models={name: _model(pool.models[name], now) for name, now in models.items()},
        servers=servers(pool),
        nodes=tuple(
            NodeRow(each.name, each.gpus, each.memory_mib, each.device_memory_mib)
            for each in (node.spec for node in pool.book.nodes.values() if node.present)
        ),
    )


def as_dict(snapshot: Snapshot) -> dict[str, Any]:
    """The snapshot as plain data for JSON. The progress of a load stands only at replicas that load."""
    plain = dataclasses.asdict(dataclasses.replace(snapshot, replicas=()))
    plain["replicas"] = rows = [row._asdict() for row in snapshot.replicas]
    for row in rows:
        if row["progress"] is None:
            del row["progress"]
    return plain


def check(pool: Pool) -> None:
    """Raise `AssertionError` if a replica would be shown as it was before. Notes how it is now, for the next time."""
    for model in pool.models.values():
        uses = _uses_now(model)
        assert model.uses in (None, uses), f"{model.name} would be shown as used by {model.uses}"
        model.uses = uses
        for replica in model.replicas:
            row = _replica(replica)
            assert replica.row in (None, row), f"{replica} would be shown as {replica.row}"
            replica.row = row


def _row(replica: Replica) -> ReplicaRow:
    """Made anew only if something has changed: a large pool has ten thousand of them."""
    row = replica.row
    if row is None:
        row = replica.row = _replica(replica)
    return cast(ReplicaRow, row)


def _replica(replica: Replica) -> ReplicaRow:
    return ReplicaRow(
        replica.model.name,
        replica.uid,
        _STATE_NAMES[replica.state],
        replica.slots,
        len(replica.leases),
        replica.place.node,
        replica.since,
        replica.serial,
        replica.used,
        replica.place.devices if replica.is_placed else (),
        replica.devices,
    )


def _model(model: Model, now: Brief) -> ModelRow:
    claim = model.claim
    return ModelRow(
        state=now.state,
        remote=now.remote,
        queued=model.queue.count,
        queued_by_class=now.queued_by_class,
        leases=now.leases,
        waiting_since=min((head.since for head in model.queue.heads()), default=None),
        last_arrival=model.last_arrival if model.last_arrival > -INFINITY else None,
        desired=model.desired,
        ready=now.ready,
        last_error=now.last_error,
        load_s=now.load_s,
        memory_mib=now.memory_mib,
        memory_estimated_mib=model.spec.memory_mib or None,
        pinned=now.pinned,
        backoff_until=model.backoff_until if model.failures else None,
        loading=model.order is not None,
        asleep=_asleep(model),
        since_by_class=now.since_by_class,
        bound_at=now.bound_at,
        drain_s=now.drain_s,
        swap=None if claim is None else _swap(claim),
    )


def _swap(claim: Claim) -> SwapRow:
    victims = tuple(each.uid or "" for each in claim.victims)
    why = claim.because
    assert why is not None, "a promise says why it was made"
    return SwapRow(victims, why.rule, why.waiter, why.cost_s)


def _asleep(model: Model) -> int:
    """How many of its replicas are kept without an engine, and have no place."""
    if not model.counts[ReplicaState.ASLEEP]:
        return 0
    return sum(1 for each in model.in_state(ReplicaState.ASLEEP) if not each.is_placed)


def servers(pool: Pool) -> tuple[ServerRow, ...]:
    """The external servers as they stand."""
    return tuple(_server(server) for server in pool.servers.known.values())


def _server(server: Server) -> ServerRow:
    return ServerRow(
        url=server.spec.url,
        available_models=server.models if server.is_up else (),
        active_requests=len(server.leases),
        max_concurrent=server.spec.max_concurrent,
        current_model=server.current,
        is_busy=server.is_busy,
        is_up=server.is_up,
        last_refresh_error=server.error,
    )


def state(model: Model) -> str:
    """A model's state in the admin route's words: its best replica's."""
    counts = model.counts
    if counts[ReplicaState.READY]:
        return "loaded"
    if model.rising:
        return "loading"
    if model.making_room:
        return "unloading"
    if model.placed and counts[ReplicaState.STOPPING] and not model.failures:
        return "unloading"
    return "failed" if model.failures else "unloaded"


def queue_position(pool: Pool, request: str) -> tuple[str, int | str] | None:
    """Where a request waits: ("queued", 1-based position) or ("loading", model); None if it does not wait."""
    waiter = pool.waiters.get(request)
    if waiter is None:
        return None
    if policy.phase(waiter.model) == "loading":
        return "loading", waiter.model.name
    return "queued", waiter.model.queue.position(waiter)


def no_progress_since(pool: Pool) -> float:
    """Since when the longest waiting has waited; infinite if nobody does."""
    return min((head.since for model in pool.models.values() for head in model.queue.heads()), default=INFINITY)


def describe(pool: Pool) -> str:
    """One line: `<Ledger e1 2 active, 1 queued, 1 idle replica>`."""
    idle, starting = len(pool.idle), sum(model.rising for model in pool.resident)
    parts = [f"{len(pool.leases)} active", f"{len(pool.waiters)} queued", f"{idle} idle"]
    if starting:
        parts.append(f"{starting} starting")
    return f"<Ledger {pool.epoch}: {', '.join(parts)}>"
