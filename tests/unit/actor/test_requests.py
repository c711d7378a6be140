"""Requests and leases at the actor: parked, granted, given up, and reconciled with what their holder says."""

from __future__ import annotations

import asyncio
import logging

import pytest

from cluster.ledger.events import Grant, LeaseReleased, Reject
from cluster.metrics import Outcome
from cluster.parked import unpacked
from cluster.request import Request
from tests.unit.actor.no_ray import MODELS, Cluster, configuration, engine, holder, turns

CONFIG = configuration(MODELS)


async def arrive(actor, requests: list[Request], sent: int = 0) -> list[Grant | Reject | None]:
    return [unpacked(each) for each in await actor.acquire_now("h", [tuple(each) for each in requests], sent)]


def leases(actor) -> int:
    return actor._ledger.snapshot().leases


async def test_a_request_waits_for_its_model_and_is_granted_once_it_is_ready(cluster: Cluster):
    actor = await cluster.life(CONFIG)
    assert await arrive(actor, [Request("r", "a")]) == [None]
    waiting = cluster.park(actor.acquire("h", Request("r", "a")))
    assert await actor.desired(-1) == (1, {"a": 1})
    await cluster.serve(actor, "a", "u")
    grant = await waiting
    assert (grant.request, grant.model, grant.replica) == ("r", "a", "u")
    assert grant.address == engine().address
    (at_once,) = await arrive(actor, [Request("s", "a")])
    assert isinstance(at_once, Grant)
    await actor.settle([("r", grant.generation, None), ("s", at_once.generation, None)])
    assert leases(actor) == 0


async def test_an_unknown_model_is_refused_with_a_value(cluster: Cluster):
    actor = await cluster.life(CONFIG)
    (answer,) = await arrive(actor, [Request("r", "x")])
    assert isinstance(answer, Reject)
    assert answer.error == "ModelNotFound"


async def test_a_client_that_left_is_no_longer_in_the_queue(cluster: Cluster):
    actor = await cluster.life(CONFIG)
    waiting = cluster.park(actor.acquire("h", Request("r", "a")))
    await turns()
    await actor.settle([("r", None, None)])
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert actor._ledger.snapshot().queued == 0


async def test_a_lost_release_is_made_good_by_the_next_announcement(cluster: Cluster):
    actor = await cluster.life(CONFIG)
    cluster.park(actor.attach_holder(holder(CONFIG)))
    await cluster.serve(actor, "a", "u")
    held, lost, given_up = await arrive(actor, [Request(each, "a") for each in ("r", "s", "t")], 1)
    assert isinstance(held, Grant)
    assert isinstance(lost, Grant)
    assert given_up is None
    await actor.holder_alive(holder(CONFIG, held, lost, waiting=("t",), sent=1))
    assert leases(actor) == 2
    await actor.holder_alive(holder(CONFIG, held, sent=1))
    assert leases(actor) == 1
    assert actor._ledger.snapshot().queued == 0
    assert actor._parked.find("t") is None
    (again,) = await arrive(actor, [Request("v", "a")], 2)
    assert isinstance(again, Grant)


async def test_an_announcement_that_requests_have_overtaken_ends_nothing(cluster: Cluster):
    actor = await cluster.life(CONFIG)
    cluster.park(actor.attach_holder(holder(CONFIG)))
    await cluster.serve(actor, "a", "u")
    before = holder(CONFIG, sent=1)
    await arrive(actor, [Request("r", "a")], 2)
    await actor.holder_alive(before)
    assert leases(actor) == 1


async def test_a_dead_holder_leaves_nothing(cluster: Cluster):
    actor = await cluster.life(CONFIG)
    cluster.park(actor.attach_holder(holder(CONFIG)))
    await cluster.serve(actor, "a", "u")
    await arrive(actor, [Request(each, "a") for each in ("r", "s", "t")], 1)
    await cluster.dead.put("actor-of-h")
    await turns()
    snapshot = actor._ledger.snapshot()
    assert (snapshot.leases, snapshot.queued) == (0, 0)
    assert actor._parked.find("t") is None


async def test_an_exception_inside_the_ledger_ends_this_life_and_says_which_event_it_was(cluster: Cluster, caplog):
    actor = await cluster.life(CONFIG)

    def decide(event: object, now: float) -> list[object]:
        raise KeyError("a book is half-changed")

    actor._ledger.decide = decide
    with caplog.at_level(logging.CRITICAL), pytest.raises(KeyError):
        actor._post(LeaseReleased("r", 7))
    assert cluster.ended_lives == 1
    assert "LeaseReleased(request='r', generation=7)" in caplog.text
    with pytest.raises(KeyError):
        actor._tick()
    assert cluster.ended_lives == 2


async def test_a_fault_of_those_who_only_look_on_keeps_no_decision_from_being_carried_out(cluster: Cluster, caplog):
    actor = await cluster.life(CONFIG)
    cluster.park(actor.attach_holder(holder(CONFIG)))
    await cluster.serve(actor, "a", "u")

    def fail(_: object) -> None:
        raise KeyError("x")

    actor._watch.decided = fail
    actor._counts.ended = fail
    (grant,) = await arrive(actor, [Request("r", "a")])
    assert isinstance(grant, Grant)
    assert "the change log missed" in caplog.text
    with pytest.raises(KeyError):
        await actor.settle([("r", grant.generation, Outcome("a", "chat", "anonymous", 2, 200))])
    assert leases(actor) == 0
    assert cluster.ended_lives == 0
