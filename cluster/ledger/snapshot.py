"""What the ledger shows of itself: for the status route, for keep-alive comments, for the debugger."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from cluster.ledger.books import server_moves
from cluster.ledger.books.queue import INFINITY
from cluster.ledger.books.servers import is_remote
from cluster.ledger.rules import policy
from cluster.ledger.states import ReplicaState

if TYPE_CHECKING:
    from cluster.ledger.books.pool import Pool
    from cluster.ledger.books.records import Model


class ModelView(NamedTuple):
    """What an operator's call waits for, of one model. `ordered`: a load is under way as a whole.

    `replicas` counts all records, down to those whose process is still to die; `leaving` only these last.
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


def view(pool: Pool, name: str) -> ModelView | None:
    """One model at a glance; None if there is none of that name."""
    model = pool.models.get(name)
    if model is None:
        return None
    return ModelView(
        state=state(model),
        ready=model.counts[ReplicaState.READY],
        replicas=len(model.replicas),
        leaving=model.leaving,
        ordered=model.order is not None,
        unloading=model.unloading,
        held_down=model.held_down,
        failures=model.failures,
        last_error=model.last_error,
    )


def take(pool: Pool) -> dict[str, Any]:
    """The whole state as plain data. Changes nothing; costs a pass over all models and replicas.

    Times (`since`, `waiting_since`, `last_arrival`, `backoff_until`) are on the ledger's own clock.
    """
    return {
        "epoch": pool.epoch,
        "recovering": pool.is_recovering,
        "leases": len(pool.leases) + len(pool.servers.leases),
        "queued": len(pool.waiters),
        "submitted": pool.submitted,
        "finished": pool.finished,
        "rejected": pool.rejected,
        "replicas": [
            {
                "model": replica.model.name,
                "replica": replica.uid,
                "state": replica.state.name,
                "slots": replica.slots,
                "leases": len(replica.leases),
                "node": replica.place.node,
                "since": replica.since,
            }
            for model in pool.models.values()
            for replica in model.replicas
        ],
        "models": {name: _model(pool, model) for name, model in pool.models.items()},
        "servers": server_moves.rows(pool),
    }


def _model(pool: Pool, model: Model) -> dict[str, Any]:
    best = state(model)
    remote = pool.servers.state(model.name) if best in ("unloaded", "failed") else None
    on_servers = sum(1 for lease in pool.servers.leases.values() if lease.model == model.name)
    return {
        "state": remote or best,
        "remote": is_remote(model),
        "queued": model.queue.count,
        "leases": model.leased + on_servers,
        "waiting_since": min((head.since for head in model.queue.heads()), default=None),
        "last_arrival": model.last_arrival if model.last_arrival > -INFINITY else None,
        "desired": model.desired,
        "ready": model.counts[ReplicaState.READY],
        "last_error": model.last_error,
        "load_s": model.load_s,
        "memory_mib": model.measured_mib,
        "pinned": model.is_pinned,
        "backoff_until": model.backoff_until if model.failures else None,
        "loading": model.order is not None,
    }


def state(model: Model) -> str:
    """A model's state in the admin route's words: its best replica's."""
    counts = model.counts
    if counts[ReplicaState.READY]:
        return "loaded"
    if counts[ReplicaState.STARTING]:
        return "loading"
    if counts[ReplicaState.DRAINING] or counts[ReplicaState.STOPPING]:
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
    idle, starting = len(pool.idle), sum(model.counts[ReplicaState.STARTING] for model in pool.resident)
    parts = [f"{len(pool.leases)} active", f"{len(pool.waiters)} queued", f"{idle} idle"]
    if starting:
        parts.append(f"{starting} starting")
    return f"<Ledger {pool.epoch}: {', '.join(parts)}>"
