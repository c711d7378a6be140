"""Server pools whose manifests were read, without HTTP."""

from __future__ import annotations

from cluster import (
    ServerConfig,
    ServerPool,
)
from cluster.ledger.events import ServerManifest

A, B = "http://a:1", "http://b:1"


def stocked(*urls: str | ServerConfig, models: str = "m n", **options: float) -> ServerPool:
    """A pool whose manifests were read, without HTTP."""
    pool = ServerPool(urls, **options)
    for url in pool.servers:
        pool._post(ServerManifest(url, tuple(models.split())))
    return pool


def check(pool: ServerPool) -> None:
    pool._ledger.check()


def idle(pool: ServerPool) -> bool:
    check(pool)
    snapshot = pool._ledger.snapshot()
    return not (snapshot.leases or snapshot.queued or pool._held or pool._takers)
