"""Gives the free slots of external servers to whose turn it is (`rules.server_turns`)."""

from __future__ import annotations

from cluster.ledger.books import server_moves, servers
from cluster.ledger.books.pool import Pool
from cluster.ledger.books.records import Model, Waiter
from cluster.ledger.books.servers import Server
from cluster.ledger.rules import policy, server_turns
from cluster.ledger.rules.server_turns import load, rank

# How many models are waited for before it is known whether some server offers them.
MAX_EXPECTED = 1000


def dispatch(pool: Pool, now: float) -> None:
    """Grant all that external servers can be given now: the best waiter first, on the least loaded server."""
    while pool.waiters and not pool.is_recovering:
        offers: dict[Model, list[Server]] = {}
        for server in pool.servers.known.values():
            if (
                server.is_up
                and not server.is_busy
                and (model := server_turns.next_model(pool, server, now)) is not None
            ):
                offers.setdefault(model, []).append(server)
        if not offers:
            return
        model = min(offers, key=rank)
        head = model.queue.head()
        assert head is not None, "a model's turn comes only while somebody waits for it"
        server = min(offers[model], key=lambda each: load(pool, each, model))
        server_moves.grant(pool, server, head, now, policy.split_wait(model, head, now))


def squeeze_in(pool: Pool, waiter: Waiter, now: float) -> bool:
    """A request for which there is no room to wait is granted if it need not wait. Changes nothing otherwise."""
    if not pool.servers.offers(waiter.model.name):
        return False
    pool.enqueue(waiter, now)
    dispatch(pool, now)
    if waiter.waits:
        pool.dequeue(waiter)
        return False
    return True


def expected(pool: Pool, name: str, now: float) -> Model | None:
    """A record for a model that some server, which was not heard yet, may turn out to offer."""
    if not pool.servers.undecided or len(pool.models) >= MAX_EXPECTED + len(pool.spec.models):
        return None
    model = pool.models[name] = Model(servers.remote_spec(name), now)
    return model
