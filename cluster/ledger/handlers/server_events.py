"""What external servers and the holders of their slots do: manifests come and go, leases end.

A pool with servers looks here first: an event about a lease on a server ends here, all others go on to the handlers
that every pool has.
"""

from __future__ import annotations

import logging

from cluster.ledger.books import server_moves, servers
from cluster.ledger.books.pool import Pool
from cluster.ledger.books.records import Model
from cluster.ledger.books.servers import Server, ServerLease
from cluster.ledger.events import (
    HolderAnnounced,
    HolderDied,
    LeaseReannounced,
    LeaseReleased,
    RequestArrived,
    RequestCancelled,
    ServerManifest,
    ServerSuspected,
)
from cluster.ledger.handlers import holders, requests
from cluster.ledger.rules import policy
from cluster.ledger.specs import ServerSpec

log = logging.getLogger(__name__)

# A manifest is somebody else's word: no more models than this are taken from one.
MAX_MODELS = 10_000


def server_manifest(pool: Pool, event: ServerManifest, now: float) -> None:
    """Take what a server says that it offers. What runs on it goes on, whatever it says."""
    server = pool.servers.known.get(event.server)
    if server is None or not server.spec.max_concurrent:
        log.info("manifest of unknown server %s ignored", event.server)
        return
    was = (server.heard, server.is_up, server.models)
    server.heard = True
    server.is_up = event.models is not None
    server.error = None if server.is_up else event.error or "its manifest cannot be read"
    if event.models is not None:
        server.models = tuple(dict.fromkeys(event.models))[:MAX_MODELS]
    if was != (True, server.is_up, server.models):
        _offers_changed(pool, now)


def server_suspected(pool: Pool, event: ServerSuspected, now: float) -> None:
    """As if the server were new: whether it is there, and with what, its next manifest says."""
    server = pool.servers.known.get(event.server)
    if server is None or not server.is_up:
        log.info("suspicion against server %s ignored: unknown, or not up", event.server)
        return
    server.heard = server.is_up = False


def configure(pool: Pool, specs: tuple[ServerSpec, ...], now: float) -> None:
    """Take the configured servers; a new one offers nothing until its manifest was read."""
    wanted = {spec.url: spec for spec in specs}
    for url, server in list(pool.servers.known.items()):
        if url not in wanted:
            server_moves.retire(pool, server)
    for url, spec in wanted.items():
        known = pool.servers.known.get(url)
        if known is None:
            pool.servers.known[url] = Server(spec)
        else:
            # One that was removed and came back while it was still in use is heard anew.
            known.heard = known.heard and known.spec.max_concurrent > 0
            known.configure(spec)
    _offers_changed(pool, now)


def keep(pool: Pool, model: Model) -> bool:
    """Whether a model without a configuration is, or may turn out to be, offered by servers. Makes it theirs."""
    if model.name not in pool.servers.by_model and not (servers.is_remote(model) and pool.servers.undecided):
        return False
    model.removed = False
    model.order = None
    model.spec = servers.remote_spec(model.name)
    model.reshape()
    return True


def _offers_changed(pool: Pool, now: float) -> None:
    """Make the models that are offered known, let those go that are not any more, and refuse who waits in vain."""
    pool.servers.index()
    for name in pool.servers.by_model:
        model = pool.models.get(name)
        if model is None:
            pool.models[name] = Model(servers.remote_spec(name), now)
        elif model.removed:
            keep(pool, model)
    gone = [model for model in pool.models.values() if servers.is_remote(model) and not keep(pool, model)]
    for model in gone:
        model.removed = True
        pool.touched[model] = None
    if pool.is_recovering:
        return
    for model in list(pool.models.values()):
        if model.queue.count and (refusal := policy.unavailable(pool, model, now)) is not None:
            for waiter in list(model.queue):
                requests.refuse_or_reroute(pool, waiter, now, refusal)


# --- leases on servers ----------------------------------------------------------------------------------------------


def request_arrived(pool: Pool, event: RequestArrived, now: float) -> None:
    lease = pool.servers.leases.get(event.request)
    if lease is not None:
        server_moves.announce(pool, lease)
    else:
        requests.request_arrived(pool, event, now)


def request_cancelled(pool: Pool, event: RequestCancelled, now: float) -> None:
    lease = pool.servers.leases.get(event.request)
    if lease is not None:
        server_moves.release(pool, lease, now)
        pool.cancelled.add(event.request, now)
    else:
        requests.request_cancelled(pool, event, now)


def lease_released(pool: Pool, event: LeaseReleased, now: float) -> None:
    lease = pool.servers.leases.get(event.request)
    if lease is None or lease.generation != event.generation:
        requests.lease_released(pool, event, now)
        return
    if lease.generation <= pool.inherited:
        # Its re-announcement may come a second time.
        pool.released.add(f"{event.request}/{event.generation}", now)
    server_moves.release(pool, lease, now)


def holder_died(pool: Pool, event: HolderDied, now: float) -> None:
    holders.holder_died(pool, event, now)
    for lease in [each for each in pool.servers.leases.values() if each.holder == event.holder]:
        server_moves.release(pool, lease, now)


def holder_announced(pool: Pool, event: HolderAnnounced, now: float) -> None:
    holders.holder_announced(pool, event, now)
    held, waiting = set(event.leases), set(event.waiting)
    for lease in [each for each in pool.servers.leases.values() if each.holder == event.holder]:
        if lease.request not in waiting and (lease.request, lease.generation) not in held:
            log.warning("lease %s on %r is not known to its holder any more, released", lease.request, lease.server)
            lease_released(pool, LeaseReleased(lease.request, lease.generation), now)


def lease_reannounced(pool: Pool, event: LeaseReannounced, now: float) -> None:
    """A stream of the epoch before still runs on a server, whose manifest need not have been read yet.

    It is held also where the server may take fewer now: a stream that nobody counts is cut by the next swap.
    """
    server = pool.servers.known.get(event.replica)
    if server is None:
        holders.lease_reannounced(pool, event, now)
        return
    ended = f"{event.request}/{event.generation}" in pool.released or event.request in pool.cancelled
    if ended or event.request in pool.servers.leases or event.holder in pool.dead_holders:
        log.info("re-announced lease %s ignored: known already, of nobody, or ended", event.request)
        return
    if server.spec.just_in_time and server.current not in (None, event.model):
        log.warning("re-announced lease %s ignored: %r runs another model", event.request, server)
        return
    waiter = pool.waiters.get(event.request)
    if waiter is not None:
        pool.dequeue(waiter)
        pool.touched[waiter.model] = None
    else:
        pool.submitted += 1
    pool.inherited = max(pool.inherited, event.generation)
    pool.generation = max(pool.generation, event.generation)
    lease = ServerLease(event.request, event.holder, event.model, server, event.generation, now, (0.0, 0.0))
    server_moves.hold(pool, lease)
    server.allowed = max(server.allowed, len(server.leases))
