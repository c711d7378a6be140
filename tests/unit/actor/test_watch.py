"""What the ledger's actor counts, and what it tells those who follow it."""

from __future__ import annotations

from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from cluster.actor import LedgerActor
from cluster.ledger.events import Grant
from cluster.metrics import Outcome
from cluster.request import Request
from tests.unit.actor.no_ray import MODELS, Cluster, configuration, turns

CONFIG = configuration(MODELS)


async def ended(actor: LedgerActor) -> dict[tuple[str, str], float]:
    """Requests that ended, by model and status."""
    text = (await actor.metrics()).decode()
    (requests,) = [each for each in text_string_to_metric_families(text) if each.name == "slotpool_requests"]
    return {(each.labels["model"], each.labels["status"]): each.value for each in requests.samples}


async def grant(actor: LedgerActor, request: str, model: str = "a") -> Grant:
    granted = await actor.acquire("h", Request(request, model))
    assert isinstance(granted, Grant)
    return granted


async def test_what_an_ingress_says_of_a_request_is_counted(cluster: Cluster):
    actor = await cluster.life(CONFIG)
    await cluster.serve(actor, "a", "u")
    lease = await grant(actor, "r")
    assert await ended(actor) == {}
    outcome = Outcome("a", "chat", "alice", 2, 200, 0.0, 0.0, 0.1, 0.5, 7, 0, 5)
    await actor.settle([("r", lease.generation, outcome)])
    assert await ended(actor) == {("a", "200"): 1}
    assert b'slotpool_tokens_out_total{model="a"} 5.0' in await actor.metrics()


async def test_a_lost_lease_counts_as_no_request(cluster: Cluster):
    actor = await cluster.life(CONFIG)
    await cluster.serve(actor, "a", "u")
    lease = await grant(actor, "r")
    await actor.settle([("r", lease.generation, None)])
    assert await ended(actor) == {}


async def test_refusals_and_clients_that_leave_the_queue_are_counted_here(cluster: Cluster):
    actor = await cluster.life(CONFIG)
    await actor.acquire_now("h", [Request("r", "nobody knows it")])
    waits = cluster.park(actor.acquire("h", Request("s", "a", timeout_s=0.05)))
    await waits
    await actor.acquire_now("h", [Request("t", "a")])
    await actor.settle([("t", None, None)])
    await turns()
    assert await ended(actor) == {("unknown", "404"): 1, ("a", "504"): 1, ("a", "499"): 1}


async def test_a_request_that_waited_and_was_granted_is_counted_once(cluster: Cluster):
    actor = await cluster.life(CONFIG)
    waits = cluster.park(actor.acquire("h", Request("r", "a")))
    await turns()
    await cluster.serve(actor, "a", "u")
    lease = await waits
    await actor.settle([("r", lease.generation, Outcome("a", "chat", "anonymous", 2, 200))])
    assert await ended(actor) == {("a", "200"): 1}


async def test_a_follower_sees_a_model_come_up(cluster: Cluster):
    actor = await cluster.life(CONFIG)
    first = await actor.changes("", 0, 1.0)
    assert first.snapshot is not None
    assert (first.snapshot.now > 0, first.snapshot.time > 0) == (True, True)
    await cluster.serve(actor, "a", "u")
    await actor.replica_progress("u", 0.5)
    told: list[Any] = (await actor.changes(first.epoch, first.version, 1.0)).changes
    assert [each.version for each in told] == list(range(first.version + 1, first.version + 1 + len(told)))
    steps = [each.data["cause"] for each in told if each.kind == "replica"]
    assert steps == ["placed", "announced", "assigned", "loaded"]
    assert [each.data["state"] for each in told if each.kind == "model" and each.model == "a"][-1] == "loaded"
    assert [(each.model, each.replica, each.data) for each in told if each.kind == "load"] == [
        ("a", "u", {"progress": 0.5})
    ]
