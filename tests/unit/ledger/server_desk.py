"""Drives a ledger with external servers by hand; every step is checked."""

from __future__ import annotations

from cluster.ledger.events import (
    Event,
    Grant,
    LeaseReleased,
    Reject,
    RequestArrived,
    ServerManifest,
)
from cluster.ledger.ledger import Ledger
from cluster.ledger.snapshot import ServerRow
from cluster.ledger.specs import PoolSpec, ServerSpec

ONE, TWO = "http://one", "http://two"


class Desk:
    """A ledger with external servers, driven by hand; every step is checked."""

    def __init__(self, *specs: ServerSpec, manifests: dict[str, str] | None = None, **pool: object) -> None:
        self.spec = PoolSpec(servers=specs, **pool)
        self.ledger = Ledger(self.spec, epoch="e1", now=0.0)
        self.now = 0.0
        self.held: dict[str, Grant] = {}
        for url, models in (manifests or {}).items():
            self.hear(url, models)

    def post(self, event: Event, after: float = 0.0) -> list[object]:
        self.now += after
        out = self.ledger.decide(event, self.now)
        self.ledger.check()
        for command in out:
            if isinstance(command, Grant):
                self.held[command.request] = command
        return out

    def hear(self, url: str, models: str | None, error: str | None = None) -> list[object]:
        return self.post(ServerManifest(url, None if models is None else tuple(models.split()), error))

    def ask(
        self, request: str, model: str, priority: int = 2, timeout: float = 1000.0, holder: str = "h"
    ) -> list[object]:
        return self.post(RequestArrived(request, holder, model, priority, self.now + timeout))

    def done(self, request: str, after: float = 1.0) -> list[object]:
        return self.post(LeaseReleased(request, self.held.pop(request).generation), after)

    def server(self, url: str = ONE) -> ServerRow:
        return next(row for row in self.ledger.snapshot().servers if row.url == url)


def granted(out: list[object]) -> dict[str, str]:
    return {each.request: each.replica for each in out if isinstance(each, Grant)}


def refused(out: list[object]) -> dict[str, str]:
    return {each.request: each.error for each in out if isinstance(each, Reject)}
