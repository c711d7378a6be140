"""The primitive moves of external servers' leases on the pool's books. A move never decides anything."""

from __future__ import annotations

from cluster.ledger.books.pool import Pool
from cluster.ledger.books.queue import INFINITY
from cluster.ledger.books.records import Waiter
from cluster.ledger.books.servers import Server, ServerLease, is_remote
from cluster.ledger.events import Grant
from cluster.ledger.specs import ServerSpec


def grant(pool: Pool, server: Server, waiter: Waiter, now: float, waits: tuple[float, float]) -> None:
    """Give a free slot to one that waits, and tell its holder."""
    pool.dequeue(waiter)
    pool.touched[waiter.model] = None
    pool.generation += 1
    lease = ServerLease(waiter.request, waiter.holder, waiter.model.name, server, pool.generation, now, waits)
    hold(pool, lease)
    announce(pool, lease)


def hold(pool: Pool, lease: ServerLease) -> None:
    pool.servers.turns += 1
    lease.server.take(lease, pool.servers.turns)
    pool.servers.leases[lease.request] = lease


def announce(pool: Pool, lease: ServerLease) -> None:
    """Tell the holder of its lease; told twice it changes nothing."""
    url = lease.server.spec.url
    # A server takes one request as one, however many sequences it runs for it: that is the server's own business.
    slots = (lease.slot,)
    pool.out.append(Grant(lease.request, lease.holder, lease.model, url, slots, lease.generation, *lease.waits))


def release(pool: Pool, lease: ServerLease, now: float) -> None:
    """Give a slot back, for whatever reason."""
    del pool.servers.leases[lease.request]
    lease.server.give_back(lease, now)
    pool.finished += 1
    model = pool.models.get(lease.model)
    if model is not None:
        took = now - lease.granted_at
        model.service_s += 0.1 * (took - model.service_s) if model.service_s else took
        pool.touched[model] = None
    forget_retired(pool, lease.server)


def retire(pool: Pool, server: Server) -> None:
    """A server left the configuration: it gets nothing new."""
    server.is_up, server.heard = False, True
    server.models = ()
    server.error = "the server was removed from the configuration"
    server.configure(ServerSpec(server.spec.url, 0, server.spec.just_in_time))
    forget_retired(pool, server)


def forget_retired(pool: Pool, server: Server) -> None:
    if not server.spec.max_concurrent and not server.leases:
        del pool.servers.known[server.spec.url]


def check(pool: Pool) -> None:
    """Raise `AssertionError` with the first broken invariant. Changes nothing."""
    books = pool.servers
    by_server = {request: lease for server in books.known.values() for request, lease in server.leases.items()}
    assert by_server == books.leases, "the leases of the servers are not the leases of the pool"
    assert not books.leases.keys() & pool.leases.keys(), "a request holds a lease on a server and on a replica"
    assert not books.leases.keys() & pool.waiters.keys(), "a request waits and holds a lease on a server"
    for url, server in books.known.items():
        held = {lease.model for lease in server.leases.values()}
        assert server.spec.url == url, f"{server} is listed as {url}"
        assert len(server.leases) <= server.allowed, f"{server} holds more leases than it has slots"
        assert len(held) <= 1 or not server.spec.just_in_time, f"{server} loads just in time and runs {sorted(held)}"
        assert (server.current is None) == (not held), f"{server}: a current model without leases, or none with"
        assert server.current is None or not server.spec.just_in_time or held == {server.current}, f"{server}: {held}"
        slots = {lease.slot for lease in server.leases.values()}
        assert len(slots) == len(server.leases), f"{server}: two leases on one slot"
        assert server.is_up <= server.heard, f"{server} is up and was never heard"
    offered = {name: [each for each in books.known.values() if name in each.models] for name in books.by_model}
    assert offered == books.by_model, "who offers what is not what the servers say"
    for name in books.by_model:
        assert name in pool.models, f"{name} is offered, and nobody can ask for it"
    for model in pool.models.values():
        if is_remote(model) and not model.removed:
            assert model.name in books.by_model or books.undecided, f"{model.name} is offered by nobody"
        if not pool.is_recovering and is_remote(model) and model.queue.count:
            assert books.offers(model.name) or books.undecided, f"requests wait for {model.name}, which nobody serves"
    assert INFINITY > pool.generation >= max((lease.generation for lease in books.leases.values()), default=0)
