"""The configuration in the actor: the newest wins, changes are compared and set, overrides end with their load."""

from __future__ import annotations

import asyncio

import pytest

from cluster import effects
from cluster import mailbox as mailbox_module
from cluster.config.version import with_model, without_model
from cluster.ledger.events import LoadRefused
from cluster.operator_calls import Done
from cluster.orders import Load
from tests.unit.actor.no_ray import MODELS, Cluster, configuration, engine, holder, started, turns

CONFIG = configuration(MODELS)
LATER = (2000.0, 0)


async def test_the_newer_configuration_wins_and_an_older_one_never_overwrites_it(cluster: Cluster):
    actor = await cluster.life(CONFIG)
    cluster.park(actor.attach_holder(holder(configuration({"c": {}}, LATER))))
    await turns()
    current = await actor.config((0.0, 0))
    assert (current.version[0], set(current.pool.models)) == (LATER[0], {"c"})
    cluster.park(actor.attach_holder(holder(CONFIG)))
    await turns()
    assert await actor.config((0.0, 0)) == current
    assert set(actor._ledger.snapshot().models) == {"c"}


async def test_followers_hear_of_a_change_and_of_no_older_one(cluster: Cluster):
    actor = await cluster.life(CONFIG)
    assert await actor.config(LATER, timeout_s=0.01) == CONFIG
    following = cluster.park(actor.config(CONFIG.version))
    await turns()
    assert not following.done()
    changed = with_model(CONFIG, "c", {"backend": "fake"})
    assert await actor.replace_config(CONFIG.version, changed) == changed
    assert await following == changed


async def test_of_two_changes_to_one_version_the_first_is_taken(cluster: Cluster):
    actor = await cluster.life(CONFIG)
    mine, other = (with_model(CONFIG, name, {"backend": "fake"}) for name in ("mine", "other"))
    assert mine.version == other.version
    assert await actor.replace_config(CONFIG.version, mine) == mine
    assert await actor.replace_config(CONFIG.version, other) == mine
    assert await actor.replace_config(CONFIG.version, mine) == mine, "a lost answer is asked for again"
    after = with_model(mine, "other", {"backend": "fake"})
    assert await actor.replace_config(mine.version, after) == after
    assert set(actor._ledger.snapshot().models) == {"a", "b", "mine", "other"}


async def test_a_fresh_deploy_keeps_what_was_registered_at_run_time(cluster: Cluster):
    actor = await cluster.life(CONFIG)
    await actor.replace_config(CONFIG.version, with_model(CONFIG, "mine", {"backend": "fake"}))
    cluster.park(actor.attach_holder(holder(configuration({"b": {}}, LATER))))
    await turns()
    current = await actor.config((0.0, 0))
    assert set(current.pool.models) == {"b", "mine"}
    assert current.version > LATER, "the ingresses of the deploy hear of it, too"


async def test_a_removed_model_drains_and_what_is_desired_follows(cluster: Cluster):
    actor = await cluster.life(CONFIG)
    cluster.park(actor.load("a", 1))
    await cluster.serve(actor, "a", "u")
    version, desired = await actor.desired(-1)
    assert desired["a"] == 1
    await actor.replace_config(CONFIG.version, without_model(CONFIG, "a"))
    assert (await actor.desired(version))[1]["a"] == 0
    await cluster.dead.put("actor-of-u")
    await turns()
    assert "a" not in actor._ledger.snapshot().models


async def test_a_new_life_decides_nothing_before_an_ingress_has_told_it_the_newest(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(mailbox_module, "RECOVERY_S", 0.0)
    newest = with_model(CONFIG, "mine", {"backend": "fake", "min_replicas": 1})
    actor = await cluster.life(CONFIG, restarted=True)
    assert await actor.desired(-1, timeout_s=0.05) == (0, {})
    loading = cluster.park(actor.load("mine", 1))
    cluster.park(actor.attach_holder(holder(newest)))
    _, desired = await actor.desired(0, timeout_s=5.0)
    assert desired["mine"] == 1
    await cluster.serve(actor, "mine", "u")
    assert await asyncio.wait_for(loading, 5) == Done("mine", 1)


async def test_replicas_of_what_was_changed_at_run_time_are_not_judged_by_the_first_configuration(cluster: Cluster):
    """They announce themselves before the ingress that knows what they run."""
    newest = configuration({"a": {"engine_kwargs": {"tokens": 9}}}, (2000.0, 3))
    actor = await cluster.life(CONFIG, restarted=True)
    cluster.park(actor.attach_replica(started("a", "u", engine=engine())))
    await turns()
    cluster.park(actor.attach_holder(holder(newest)))
    _, desired = await actor.desired(0, timeout_s=10.0)
    assert desired["a"] == 1
    assert actor._ledger.snapshot().replicas[0].state == "READY"


async def test_a_new_life_decides_nothing_before_every_replica_that_runs_has_said_what_it_holds(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
):
    """Else the devices of one that is late are another's by the time it comes."""
    monkeypatch.setattr(mailbox_module, "RECOVERY_S", 0.0)
    monkeypatch.setattr(mailbox_module, "LOOK_S", 0.01)
    models = {name: {"num_gpus": 2} for name in ("a", "b")}
    cluster.living = {"late", "dies"}
    actor = await cluster.life(configuration(models), restarted=True)
    cluster.park(actor.attach_holder(holder(configuration(models))))
    cluster.park(actor.load("b", 1))
    assert await actor.desired(-1, timeout_s=0.1) == (0, {})
    cluster.park(actor.attach_replica(started("a", "late", engine=engine())))
    assert await actor.desired(-1, timeout_s=0.1) == (0, {})
    cluster.living = {"late"}
    await actor.desired(0, timeout_s=5.0)
    states = {row.model: row.state for row in actor._ledger.snapshot().replicas}
    assert states == {"a": "STOPPING"}, "its place is not another's yet"


async def test_a_new_life_that_cannot_see_which_replicas_run_waits_for_none(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
):
    async def unseen() -> set[str]:
        raise RuntimeError("no answer")

    monkeypatch.setattr(mailbox_module, "RECOVERY_S", 0.0)
    monkeypatch.setattr(effects, "living_replicas", unseen)
    actor = await cluster.life(CONFIG, restarted=True)
    cluster.park(actor.attach_holder(holder(CONFIG)))
    assert (await actor.desired(0, timeout_s=5.0))[0]


async def test_a_new_life_without_any_ingress_waits_no_longer_than_its_bound(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(mailbox_module, "RECOVERY_LIMIT_S", 0.05)
    actor = await cluster.life(configuration({}), restarted=True)
    assert await asyncio.wait_for(actor.unload("x"), 5) == LoadRefused(
        "x", "ModelNotFound", "the model 'x' does not exist", {}
    )


# --- overrides -------------------------------------------------------------------------------------------------------

KEYS = {"engine_kwargs": {"tokens": 3}}


async def overridden_load(cluster: Cluster, actor, replica: str = "u") -> Load:
    loading = cluster.park(actor.load("a", 1, KEYS))
    order = await cluster.serve(actor, "a", replica)
    assert await loading == Done("a", 1)
    return order


async def test_overrides_hold_for_one_load_and_have_a_revision_of_their_own(cluster: Cluster):
    actor = await cluster.life(CONFIG)
    order = await overridden_load(cluster, actor)
    assert order.overrides == KEYS
    assert order.config["engine_kwargs"]["tokens"] == 3
    assert order.revision != CONFIG.pool.models["a"].revision
    assert (await actor.config((0.0, 0))).overrides == {"a": KEYS}
    assert actor._ledger.snapshot().models["a"].state == "loaded", "it is what the ledger wants"
    unloading = cluster.park(actor.unload("a"))
    await turns()
    await cluster.dead.put("actor-of-u")
    await unloading
    assert (await actor.config((0.0, 0))).overrides == {}
    again = cluster.park(actor.load("a", 1))
    order = await cluster.serve(actor, "a", "v")
    await again
    assert (order.overrides, order.revision) == ({}, CONFIG.pool.models["a"].revision)


async def test_overrides_of_a_model_that_is_loaded_or_loading_are_refused_and_change_nothing(cluster: Cluster):
    actor = await cluster.life(CONFIG)
    first = cluster.park(actor.load("a", 1))
    await turns()
    refused = await actor.load("a", 1, KEYS)
    assert (refused.error, refused.extras) == ("InvalidRequest", {"code": "invalid_load_request"})
    await cluster.serve(actor, "a", "u")
    assert await first == Done("a", 1)
    before = actor._ledger.snapshot()
    refused = await actor.load("a", 1, KEYS)
    assert (refused.error, refused.extras) == ("InvalidRequest", {"code": "invalid_load_request"})
    assert actor._ledger.snapshot() == before
    assert await actor.config((0.0, 0)) == CONFIG


@pytest.mark.parametrize(
    ("model", "replicas", "keys", "code"),
    [
        ("a", 3, KEYS, "invalid_load_request"),
        ("a", 1, {"engine_kwargs": {"no_such_key": 1}}, "invalid_load_request"),
        ("x", 1, KEYS, None),
    ],
)
async def test_bad_overrides_change_nothing(cluster: Cluster, model: str, replicas: int, keys, code: str | None):
    actor = await cluster.life(CONFIG)
    before = actor._ledger.snapshot()
    refused = await actor.load(model, replicas, keys)
    assert isinstance(refused, LoadRefused)
    assert refused.extras.get("code") == code
    assert actor._ledger.snapshot() == before
    assert await actor.config((0.0, 0)) == CONFIG


async def test_overrides_end_with_a_load_that_failed(cluster: Cluster):
    actor = await cluster.life(CONFIG)
    loading = cluster.park(actor.load("a", 1, KEYS))
    cluster.park(actor.attach_replica(started("a", "u")))
    await turns()
    await actor.replica_failed("u", "no such file")
    await cluster.dead.put("actor-of-u")
    assert (await asyncio.wait_for(loading, 5)).extras["code"] == "model_load_failed"
    assert (await actor.config((0.0, 0))).overrides == {}


async def test_a_load_that_is_asked_again_after_a_restart_finds_its_own_overrides(cluster: Cluster):
    actor = await cluster.life(CONFIG)
    await overridden_load(cluster, actor)
    known = await actor.config((0.0, 0))
    later = await cluster.life(CONFIG, restarted=True)
    loading = cluster.park(later.load("a", 1, KEYS, again=True))
    cluster.park(later.attach_holder(holder(known)))
    cluster.park(later.attach_replica(started("a", "u", engine=engine())))
    assert await asyncio.wait_for(loading, 10) == Done("a", 1)
    assert (await later.config((0.0, 0))).overrides == {"a": KEYS}


async def test_overrides_that_a_changed_model_no_longer_takes_are_dropped(cluster: Cluster):
    actor = await cluster.life(CONFIG)
    await overridden_load(cluster, actor)
    current = await actor.config((0.0, 0))
    changed = current._replace(
        version=(current.version[0], current.version[1] + 1), overrides={"a": {"no_such_key": 1}, "x": KEYS}
    )
    assert (await actor.replace_config(current.version, changed)).overrides == {}
