"""Orders to replicas: what they carry, that none is lost, and what becomes of one that is not obeyed."""

from __future__ import annotations

import asyncio

import pytest

from cluster import attached
from cluster.config.models import ModelConfig
from cluster.ledger.events import (
    EndReplica,
    LoadEngine,
    PrefetchModel,
    Quiesce,
    RestartEngine,
    SleepEngine,
    UnloadEngine,
    WakeEngine,
)
from cluster.orders import AsleepState, Load, OrderBoard, Prefetch, Restart, Sleep, Unload, Wake
from tests.unit.actor.no_ray import MODELS, Cluster, configuration, engine, holder, started, turns

CONFIG = configuration(MODELS)


def state(actor) -> str:
    return actor._ledger.snapshot().models["a"].state


async def test_an_order_to_load_carries_the_configuration_and_the_devices(cluster: Cluster):
    actor = await cluster.life(CONFIG)
    order = cluster.park(actor.load("a", 2))
    first = await cluster.serve(actor, "a", "u")
    second = await cluster.serve(actor, "a", "v")
    await order
    assert {first.devices, second.devices} == {(0,), (1,)}
    assert first._replace(devices=()) == second._replace(devices=())
    assert ModelConfig.model_validate(first.config) == CONFIG.pool.models["a"]
    assert (first.model, first.overrides, first.num_gpus) == ("a", {}, 1.0)
    assert first.revision == CONFIG.pool.models["a"].revision


async def test_a_lost_answer_is_given_again_and_a_seen_one_is_not(cluster: Cluster):
    actor = await cluster.life(CONFIG)
    cluster.park(actor.load("a", 1))
    cluster.park(actor.attach_replica(started("a", "u")))
    version, order = await actor.orders("u", 0)
    assert isinstance(order, Load)
    assert await actor.orders("u", 0) == (version, order)
    assert await actor.orders("u", version, timeout_s=0.01) == (version, None)


async def test_the_announcements_of_the_dead_end(cluster: Cluster):
    """What stays parked for a caller that is gone keeps its connection open, one more with every replica that ends."""
    actor = await cluster.life(CONFIG)
    announced = [actor.attach_replica(started("a", "u")), actor.attach_holder(holder(CONFIG))]
    replica, ingress = map(cluster.park, announced)
    await turns()
    for parked, actor_id in ((replica, "actor-of-u"), (ingress, "actor-of-h")):
        assert not parked.done()
        await cluster.dead.put(actor_id)
        await turns()
        assert parked.done()


async def test_what_a_dead_replica_asked_for_ends(cluster: Cluster):
    actor = await cluster.life(CONFIG)
    cluster.park(actor.attach_replica(started("a", "u")))
    await turns()
    version, _ = await actor.orders("u", 0, timeout_s=1.0)
    asked = cluster.park(actor.orders("u", version, timeout_s=300.0))
    other = cluster.park(actor.orders("v", 0, timeout_s=300.0))
    await turns()
    assert not asked.done()
    await cluster.dead.put("actor-of-u")
    await turns()
    assert asked.result() == (version, None)
    assert not other.done()


async def test_the_orders_of_two_lives_have_different_versions():
    former, present = OrderBoard(), OrderBoard()
    former.give("u", Restart("x"))
    seen, _ = await former.after("u", 0, 1.0)
    await asyncio.sleep(0.001)
    present.give("u", Restart("y"))
    assert (await present.after("u", seen, 1.0))[1] == Restart("y")


async def test_an_order_replaces_the_one_before_and_ends_with_its_replica(cluster: Cluster):
    actor = await cluster.life(CONFIG)
    cluster.park(actor.load("a", 1))
    await cluster.serve(actor, "a", "u")
    seen, _ = await actor.orders("u", 0)
    following = cluster.park(actor.orders("u", seen))
    await turns()
    assert not following.done()
    await actor.replica_suspected("u")
    seen, order = await following
    assert isinstance(order, Restart)
    actor._carry_out([LoadEngine("u", "a", (1,))])
    _, order = await actor.orders("u", seen)
    assert isinstance(order, Load)
    assert order.devices == (1,)
    await cluster.dead.put("actor-of-u")
    await turns()
    assert await actor.orders("u", 0, timeout_s=0.01) == (0, None)


async def test_an_engine_that_died_loads_again_in_the_same_replica(cluster: Cluster):
    actor = await cluster.life(CONFIG)
    await cluster.serve(actor, "a", "u")
    seen, _ = await actor.orders("u", 0)
    await actor.engine_died("u", "segmentation fault")
    assert state(actor) == "loading"
    _, order = await actor.orders("u", seen)
    assert isinstance(order, Load)
    await actor.replica_ready("u", engine())
    assert state(actor) == "loaded"


async def test_a_replica_that_hangs_itself_is_ended(cluster: Cluster, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attached, "RESTART_S", 0.01)
    actor = await cluster.life(CONFIG)
    cluster.park(actor.load("a", 2))
    await cluster.serve(actor, "a", "u")
    await cluster.serve(actor, "a", "v")
    await actor.replica_suspected("u")
    await actor.replica_suspected("v")
    await actor.engine_died("v", "killed: it hung")
    while not cluster.killed:
        await asyncio.sleep(0.01)
    await turns()
    assert cluster.killed == ["u"]


async def test_what_is_known_of_engines_follows_them(cluster: Cluster):
    actor = await cluster.life(CONFIG)
    cluster.park(actor.load("a", 1))
    await cluster.serve(actor, "a", "u")
    assert actor._attached.replicas["u"].engine == engine(CONFIG.pool.models["a"].revision)
    await actor.replica_progress("u", 0.5)
    await actor.engine_died("u", "x")
    assert actor._attached.replicas["u"].engine is None
    assert actor._attached.progress == {}
    await actor.replica_failed("u", "no such file")
    await cluster.dead.put("actor-of-u")
    await turns()
    assert actor._attached.replicas == {}


async def test_a_model_that_has_left_the_configuration_gets_no_order(cluster: Cluster):
    actor = await cluster.life(CONFIG)
    actor._carry_out([LoadEngine("u", "x", ())])
    assert await actor.orders("u", 0, timeout_s=0.01) == (0, None)


async def test_a_replica_of_a_model_that_a_new_life_does_not_know_yet_announces_itself_again(cluster: Cluster):
    """A restarted actor begins with the configuration that it was first made with."""
    actor = await cluster.life(configuration({"b": {}}), restarted=True)
    serving = started("a", "u", engine=engine())
    announced = cluster.park(actor.attach_replica(serving))
    await turns()
    assert not announced.done()
    newest = configuration(MODELS, (2000.0, 3))
    cluster.park(actor.attach_holder(holder(newest)))
    await announced
    cluster.park(actor.attach_replica(serving))
    await turns()
    assert state(actor) == "loaded"


async def test_every_command_to_a_replica_is_an_order(cluster: Cluster):
    actor = await cluster.life(CONFIG)
    seen = 0
    for command, expected in (
        (UnloadEngine("a", "u"), Unload("its room is needed")),
        (SleepEngine("a", "u"), Sleep()),
        (WakeEngine("a", "u", (1,)), Wake((1,))),
    ):
        actor._carry_out([command])
        seen, order = await actor.orders("u", seen)
        assert order == expected
    actor._carry_out([PrefetchModel("a", "u")])
    _, order = await actor.orders("u", seen)
    assert isinstance(order, Prefetch)
    assert ModelConfig.model_validate(order.config) == CONFIG.pool.models["a"]
    actor._carry_out([EndReplica("u")])
    await turns()
    while not cluster.killed:
        await asyncio.sleep(0.01)
    assert cluster.killed == ["u"]


async def test_a_replica_that_serve_stops_gets_nobody_new_in_this_life_and_the_next(cluster: Cluster):
    actor = await cluster.life(CONFIG)
    cluster.park(actor.load("a", 1))
    await cluster.serve(actor, "a", "u")
    await actor.replica_stopping("u")
    assert state(actor) == "unloading"
    assert actor._ledger.desired["a"] == 0
    actor = await cluster.life(CONFIG, restarted=True)
    cluster.park(
        actor.attach_replica(started("a", "u", engine=engine(CONFIG.pool.models["a"].revision), stopping=True))
    )
    cluster.park(actor.attach_holder(holder(CONFIG)))
    await turns()
    actor._ledger.recover_until(0.0)
    actor._tick()
    assert actor._ledger.desired["a"] == 0


async def test_an_order_that_waits_to_be_fetched_is_not_replaced_by_a_drain(cluster: Cluster):
    """An engine hangs, and before its replica hears that it must kill it, others want its place."""
    actor = await cluster.life(CONFIG)
    cluster.park(actor.load("a", 1))
    await cluster.serve(actor, "a", "u")
    seen, _ = await actor.orders("u", 0)
    actor._carry_out([RestartEngine("u"), Quiesce("u")])
    _, order = await actor.orders("u", seen)
    assert isinstance(order, Restart)


async def test_saved_conversations_are_counted(cluster: Cluster):
    actor = await cluster.life(CONFIG)
    await cluster.serve(actor, "a", "u")
    for _ in range(2):
        await actor.conversations_saved("u", 500)
    await actor.conversations_saved("nobody", 7)
    assert actor._counts.kv_saved_bytes == {"a": 1000}


async def test_what_sleeps_is_known_until_it_serves_or_ends(cluster: Cluster):
    actor = await cluster.life(CONFIG)
    await cluster.serve(actor, "a", "u")
    await actor.engine_asleep("u", 1000, 400)
    known = actor._attached.replicas["u"]
    assert (known.engine, known.asleep) == (None, AsleepState(1000, 400))
    await actor.replica_ready("u", engine())
    assert actor._attached.replicas["u"].asleep is None
    await actor.engine_asleep("u", 1000, 400)
    await actor.engine_unloaded("u")
    assert actor._attached.replicas["u"].asleep is None
    await actor.engine_asleep("nobody", 1, 1)
