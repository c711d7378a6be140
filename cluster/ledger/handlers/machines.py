"""What machines do: they come and go."""

from __future__ import annotations

from cluster.ledger.books.pool import Pool
from cluster.ledger.events import NodesChanged
from cluster.ledger.handlers.requests import refuse_or_reroute
from cluster.ledger.rules import policy


def nodes_changed(pool: Pool, event: NodesChanged, now: float) -> None:
    """Take the machines as they are. What stands on a machine that left is drained, until its death is confirmed."""
    pool.book.set_nodes(event.nodes)
    pool.lacks_processes = True
    pool.watch_for_quiet(now)
    for model in pool.models.values():
        if model.replicas or model.queue.count or model.order is not None or model in pool.understaffed:
            pool.touched[model] = None
    if pool.is_recovering:
        return
    for model in [model for model in pool.models.values() if model.queue.count]:
        refusal = policy.too_large(pool, model)
        if refusal is not None:
            for waiter in list(model.queue):
                refuse_or_reroute(pool, waiter, now, refusal)
