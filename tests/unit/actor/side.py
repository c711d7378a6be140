"""A ledger's actor and a client of it in one process, without Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from cluster import client as client_module
from cluster import effects, ledger_calls
from cluster.client import LedgerClient
from tests.unit.actor.no_ray import MODELS, Cluster, Handle, configuration, turns

CONFIG = configuration(MODELS)


class Side:
    """A ledger with a client, and what the test needs to disturb them."""

    def __init__(self, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cluster, self.patch = cluster, monkeypatch
        for name, value in (("RETRY_S", 0.001), ("FAULT_PAUSE_S", 0.001), ("SLACK_S", 0.05)):
            self.set_constant(name, value)
        self.clients: list[LedgerClient] = []

    def set_constant(self, name: str, value: float) -> None:
        """Change a constant of the client for one test, in both of its modules."""
        for module in (client_module, ledger_calls):
            if hasattr(module, name):
                self.patch.setattr(module, name, value)

    async def begin(self, *, serves: bool = True) -> LedgerClient:
        self.actor = await self.cluster.life(CONFIG)
        self.handle = Handle(self.actor)
        self.patch.setattr(effects, "get_or_create_ledger", lambda _, configuration: self.handle)
        self.patch.setattr(effects, "find_ledger", lambda: self.handle)
        client = LedgerClient(CONFIG, "h")
        self.clients.append(client)
        if serves:
            await self.cluster.serve(self.actor, "a", "u")
        return client

    async def restart(self) -> None:
        self.handle.lose()
        await turns()
        self.actor = await self.cluster.life(CONFIG, restarted=True)
        self.handle.come_back(self.actor)

    def counts(self) -> tuple[int, int]:
        snapshot = self.actor._ledger.snapshot()
        return snapshot.leases, snapshot.queued

    async def until(self, leases: int, queued: int) -> None:
        await self.until_holds(lambda: self.counts() == (leases, queued))

    async def until_holds(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not holds():
                await asyncio.sleep(0.001)

    def end(self) -> None:
        for client in self.clients:
            for task in client._senders:
                task.cancel()
