"""Leases over the socket of the ledger's process: the same answers as through Ray, and nothing lost when it breaks."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from cluster import effects, errors
from cluster.client import LedgerClient
from cluster.frames import Connection, ConnectionEnded, check_private
from cluster.lease_link import DECISIONS
from cluster.metrics import Outcome
from cluster.orders import Address
from cluster.request import Request
from cluster.sockets import connect
from tests.unit.actor.no_ray import Cluster, engine, turns
from tests.unit.actor.side import Side


class Linked(Side):
    """A ledger with a client whose leases go over the socket; `node` is where the client is."""

    def __init__(self, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(cluster, monkeypatch)
        monkeypatch.setattr(effects, "this_actor", lambda: ("actor", "n"))
        monkeypatch.setattr(effects, "raylet_pid", os.getpid)
        monkeypatch.setattr(effects, "open_host", lambda: "127.0.0.1")

    async def link(self, node: str = "n") -> LedgerClient:
        self.client = await self.begin()
        self.cluster.parked |= set(self.client._senders)
        self.linking = self.cluster.park(self.client.stay_linked(node))
        await self.until_holds(lambda: self.client._link.is_open)
        self.handle.calls.clear()
        return self.client

    def cut(self) -> None:
        self.client._link._connection.fail(ConnectionEnded("cut by the test"))


@pytest.fixture
def linked(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Linked:
    return Linked(cluster, monkeypatch)


def request(name: str, model: str = "a", timeout_s: float = 60.0) -> Request:
    return Request(name, model, timeout_s=timeout_s)


@pytest.mark.parametrize("node", ["n", "another"])
async def test_leases_come_and_go_without_a_call_through_ray(linked: Linked, node: str):
    client = await linked.link(node)
    first, second = await asyncio.gather(client.acquire(request("r")), client.acquire(request("s")))
    assert (first.address, first.slots) == (engine().address, (0,))
    waiting = asyncio.ensure_future(client.acquire(request("t")))
    await linked.until(2, 1)
    client.release(first, Outcome("a", "chat", "anonymous", 2, 200, 0.0, 0.0))
    third = await waiting
    client.release(second)
    client.release(third)
    await linked.until(0, 0)
    assert not linked.handle.calls
    assert not client._link._asked


async def test_what_is_decided_together_is_sent_together(linked: Linked):
    """A write for each of those who had waited would cost more than the decision about it."""
    client = await linked.link()
    held = await asyncio.gather(client.acquire(request("r")), client.acquire(request("s")))
    waiting = [asyncio.ensure_future(client.acquire(request(name))) for name in ("t", "u")]
    await linked.until(2, 2)
    written: list[bytes] = []
    write = Connection.write
    linked.patch.setattr(Connection, "write", lambda self, data: (written.append(data), write(self, data)))
    for lease in held:
        client.release(lease)
    for lease in await asyncio.gather(*waiting):
        assert lease.slots in ((0,), (1,))
    assert sum(data[4:5] == DECISIONS for data in written) == 1


async def test_refusals_and_time_limits_are_the_errors_that_http_answers(linked: Linked):
    client = await linked.link()
    with pytest.raises(errors.ModelNotFound, match="does not exist"):
        await client.acquire(request("r", "x"))
    with pytest.raises(errors.BackendTimeout):
        await client.acquire(request("s", "b", timeout_s=0.02))
    await linked.until(0, 0)


async def test_who_leaves_while_he_waits_is_no_longer_in_the_queue(linked: Linked):
    client = await linked.link()
    waiting = asyncio.ensure_future(client.acquire(request("r", "b")))
    await linked.until(0, 1)
    waiting.cancel()
    await linked.until(0, 0)
    assert not client._link._asked


async def test_what_a_broken_connection_loses_is_asked_for_again(linked: Linked):
    client = await linked.link()
    waiting = asyncio.ensure_future(client.acquire(request("r", "b")))
    await linked.until(0, 1)
    linked.cut()
    await turns()
    await linked.cluster.serve(linked.actor, "b", "v")
    lease = await waiting
    assert lease.replica == "v"
    await linked.until_holds(lambda: client._link.is_open)
    client.release(lease)
    await linked.until(0, 0)


async def test_until_there_is_a_connection_leases_go_through_ray(linked: Linked):
    client = await linked.link()
    linked.linking.cancel()
    linked.cut()
    lease = await client.acquire(request("r"))
    client.release(lease)
    await linked.until(0, 0)
    assert linked.handle.calls == ["acquire_now", "settle"]


async def test_strangers_get_nothing(linked: Linked):
    client = await linked.link("another")
    address = await linked.actor.lease_address("another")
    check_private(Path(address.unix).parent)
    stranger = await connect(address._replace(token="guessed"), "another", {b"d": 100})
    with pytest.raises(ConnectionEnded):
        await stranger.read()
    mistaken = await connect(address, "n", {b"d": 100})
    mistaken.write(b"\0\0\0\1s\xc1")
    with pytest.raises(ConnectionEnded):
        await mistaken.read()
    client.release(await client.acquire(request("r")))


async def test_a_ledger_that_others_cannot_reach_is_asked_through_ray(linked: Linked):
    linked.patch.setattr(effects, "open_host", lambda: "")
    await linked.link()
    assert await linked.actor.lease_address("another") is None
    assert isinstance(await linked.actor.lease_address("n"), Address)
    await linked.client.stay_linked("another")
