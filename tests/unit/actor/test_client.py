"""The client on a real actor without Ray: lost, hanging and restarted ledgers cost a caller its own time at most."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from cluster import effects, errors
from cluster.client import LedgerClient
from cluster.config.version import with_model
from cluster.orders import Load
from cluster.request import Request
from tests.unit.actor.no_ray import Cluster, Handle, engine, started, turns
from tests.unit.actor.side import CONFIG, Side


@pytest.fixture
def side(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Side]:
    side = Side(cluster, monkeypatch)
    yield side
    side.end()


def request(name: str, model: str = "a", timeout_s: float = 60.0) -> Request:
    return Request(name, model, timeout_s=timeout_s)


# --- leases ----------------------------------------------------------------------------------------------------------


async def test_a_burst_is_one_message_and_every_lease_comes_back(side: Side):
    client = await side.begin()
    side.handle.calls.clear()
    first, second = await asyncio.gather(client.acquire(request("r")), client.acquire(request("s")))
    assert side.handle.calls == ["acquire_now"]
    client.release(first)
    client.release(second)
    await side.until(0, 0)
    assert side.handle.calls == ["acquire_now", "settle"]


async def test_a_refusal_is_the_error_that_http_answers(side: Side):
    client = await side.begin()
    with pytest.raises(errors.ModelNotFound, match="does not exist"):
        await client.acquire(request("r", "x"))


async def test_a_request_that_is_cancelled_while_it_waits_leaves_the_queue(side: Side):
    client = await side.begin()
    waiting = asyncio.ensure_future(client.acquire(request("r", "b")))
    await side.until(0, 1)
    waiting.cancel()
    await side.until(0, 0)


async def test_a_request_that_is_cancelled_in_a_retry_pause_leaves_the_queue(side: Side):
    side.set_constant("RETRY_S", 30.0)
    client = await side.begin()
    waiting = asyncio.ensure_future(client.acquire(request("r", "b")))
    await side.until(0, 1)
    side.handle.lose()
    await turns()
    # The call is lost, but this ledger has the request in its books.
    side.handle.come_back(side.actor)
    waiting.cancel()
    await side.until(0, 0)


async def test_a_waiting_request_is_asked_for_again_in_the_next_life(side: Side):
    client = await side.begin(serves=False)
    waiting = asyncio.ensure_future(client.acquire(request("r")))
    await side.until(0, 1)
    await side.restart()
    side.cluster.park(client.attach_holder("actor-of-h"))
    side.cluster.park(side.actor.attach_replica(started("a", "u", engine=engine())))
    grant = await asyncio.wait_for(waiting, 10)
    assert grant.replica == "u"


async def test_a_ledger_that_hangs_costs_a_request_its_own_time(side: Side):
    client = await side.begin()
    side.handle.hangs = True
    for _ in range(2):
        with pytest.raises(errors.BackendTimeout) as raised:
            await asyncio.wait_for(client.acquire(request("r", timeout_s=0.1)), 5)
        assert raised.value.extras == {"phase": "queued"}
    assert client._waiting == {}


async def test_a_ledger_that_hangs_while_a_request_is_parked_costs_it_its_own_time(side: Side):
    client = await side.begin()
    waiting = asyncio.ensure_future(client.acquire(request("r", "b", timeout_s=0.3)))
    await side.until(0, 1)
    side.actor._arm_timer(None)
    with pytest.raises(errors.BackendTimeout):
        await asyncio.wait_for(waiting, 5)
    await side.until(0, 0)


async def test_a_ledger_that_is_not_found_costs_a_request_its_own_time(side: Side):
    client = await side.begin()
    side.handle.lose()
    with pytest.raises(errors.BackendTimeout):
        await asyncio.wait_for(client.acquire(request("r", timeout_s=0.1)), 5)


async def test_a_sender_that_fails_begins_anew_and_fails_who_waits_for_it(side: Side, caplog):
    client = await side.begin()
    broken = Handle(side.actor)
    broken.call = None  # type: ignore[assignment]
    client._actor = broken
    with caplog.at_level(logging.ERROR), pytest.raises(errors.BackendUnavailable):
        await client.acquire(request("r"))
    assert "_send_arrivals failed" in caplog.text
    await asyncio.sleep(0.01)
    client._actor = side.handle
    client.release(await asyncio.wait_for(client.acquire(request("s")), 5))
    await side.until(0, 0)


# --- announcements ---------------------------------------------------------------------------------------------------


async def test_a_lost_release_costs_no_longer_than_the_next_sign_of_life(side: Side):
    side.set_constant("ALIVE_PERIOD_S", 0.02)
    client = await side.begin()
    side.cluster.park(client.attach_holder("actor-of-h"))
    lost, kept = await client.acquire(request("r")), await client.acquire(request("s"))
    client._held.pop(lost.request)
    await side.until(1, 0)
    client.release(kept)
    await side.until(0, 0)


async def test_held_leases_and_waiting_requests_come_into_the_books_of_the_next_life(side: Side):
    client = await side.begin()
    attached = side.cluster.park(client.attach_holder("actor-of-h"))
    held = await client.acquire(request("r"))
    await side.restart()
    side.cluster.park(side.actor.attach_replica(started("a", "u", engine=engine())))
    await side.until(1, 0)
    client.release(held)
    await side.until(0, 0)
    assert not attached.done()


@pytest.mark.parametrize("fault", [RuntimeError("x"), ValueError("no such actor"), OSError()])
async def test_an_attachment_never_ends_whatever_goes_wrong(side: Side, fault: Exception, caplog):
    client = await side.begin()
    calls = 0

    async def fail(method: str, args: Any, kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        raise fault

    side.handle.call = fail  # type: ignore[method-assign]
    with caplog.at_level(logging.ERROR):
        attached = side.cluster.park(client.attach_holder("actor-of-h"))
        while calls < 3:
            await asyncio.sleep(0.001)
    assert not attached.done()
    assert "could not stay attached" in caplog.text
    del side.handle.call
    async with asyncio.timeout(10):
        while not side.actor._attached.actors().count("actor-of-h"):
            await asyncio.sleep(0.001)


# --- configuration, orders, operators --------------------------------------------------------------------------------


async def test_a_client_follows_the_configuration_through_the_lives_of_the_ledger(side: Side):
    client = await side.begin()
    seen = []
    side.cluster.park(client.follow_configuration(seen.append))
    side.cluster.park(client.attach_holder("actor-of-h"))
    changed = with_model(CONFIG, "mine", {"backend": "fake"})
    assert await client.replace_config(CONFIG.version, changed) == changed
    assert client.configuration == changed
    await side.restart()
    async with asyncio.timeout(10):
        while "mine" not in side.actor._ledger.snapshot().models:
            await asyncio.sleep(0.001)
    again = with_model(changed, "more", {"backend": "fake"})
    await side.actor.replace_config(changed.version, again)
    async with asyncio.timeout(10):
        while client.configuration != again:
            await asyncio.sleep(0.001)
    assert seen == [changed, again]


async def test_a_replica_gets_its_orders_through_the_lives_of_the_ledger(side: Side):
    client = await side.begin(serves=False)
    ordered = asyncio.ensure_future(client.orders("u", 0))
    await turns()
    side.cluster.park(side.actor.load("a", 1))
    side.cluster.park(side.actor.attach_replica(started("a", "u")))
    seen, order = await asyncio.wait_for(ordered, 5)
    assert isinstance(order, Load)
    ordered = asyncio.ensure_future(client.orders("u", seen))
    await side.restart()
    await turns()
    assert not ordered.done()
    ordered.cancel()


async def test_operators_and_people_hear_of_a_ledger_that_hangs(side: Side):
    side.set_constant("ANSWER_S", 0.05)
    client = await side.begin()
    assert await client.check() is None
    assert (await client.status()).models["a"].state == "loaded"
    side.handle.hangs = True
    for call in (client.status(), client.load("b", 1), client.unload("a")):
        with pytest.raises(errors.BackendUnavailable):
            await asyncio.wait_for(call, 5)
    assert await client.waiting("r") is None


async def test_an_operators_load_is_asked_for_again_in_the_next_life(side: Side):
    client = await side.begin(serves=False)
    keys = {"engine_kwargs": {"tokens": 3}}
    loading = asyncio.ensure_future(client.load("a", 1, keys))
    side.cluster.park(client.attach_holder("actor-of-h"))
    await turns()
    assert side.actor._ledger.snapshot().models["a"].loading
    await side.restart()
    async with asyncio.timeout(10):
        while not side.actor._desired.get("a"):
            await asyncio.sleep(0.01)
    order = await side.cluster.serve(side.actor, "a", "u")
    assert order.overrides == keys
    assert await asyncio.wait_for(loading, 5) == 1


# --- guests ----------------------------------------------------------------------------------------------------------


async def test_a_guest_finds_the_ledger_and_never_makes_one(side: Side, monkeypatch: pytest.MonkeyPatch):
    """A job that uses the pool may outlive it: what it takes to make a ledger is the pool's."""
    await side.begin()
    monkeypatch.setattr(effects, "get_or_create_ledger", lambda *_: pytest.fail("a guest makes a ledger"))
    guest = LedgerClient(holder="guest")
    side.clients.append(guest)
    assert (await guest.newest_configuration()).version == CONFIG.version
    side.cluster.park(guest.attach_holder("job"))
    guest.release(await guest.acquire(request("r")))
    await side.until(0, 0)
    await side.restart()
    await side.until_holds(lambda: side.actor._attached.actors() == ["job"])


async def test_a_pool_whose_only_user_is_a_guest_keeps_no_devices(side: Side):
    await side.begin(serves=False)
    guest = LedgerClient(holder="guest")
    side.clients.append(guest)
    await guest.newest_configuration()
    side.cluster.park(guest.attach_holder("job"))
    await side.until_holds(lambda: side.actor._attached.actors() == ["job"])
    assert not side.actor._use().lives
    await side.cluster.serve(side.actor, "a", "u")
    assert side.actor._use().lives
    side.cluster.dead.put_nowait("job")
    await side.until_holds(lambda: "job" not in side.actor._attached.actors())
    assert side.actor._use().lives
