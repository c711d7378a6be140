"""Replicas that stay when their engine goes: a swap is an unload and a load, and Serve hears nothing of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.ledger.events import (
    ConfigChanged,
    EngineDied,
    EngineUnloaded,
    LoadRequested,
    NodesChanged,
    ReplicaFailed,
    ReplicaReady,
    ReplicaStarted,
    UnloadRequested,
)
from cluster.ledger.specs import NodeSpec
from tests.unit.ledger.desk import Desk, model


def two(**more: object) -> Desk:
    """Model a is loaded in u and idle, b sleeps in v, and there is one device for both."""
    desk = Desk(model("a"), model("b"), **{"max_asleep": None, **more})  # type: ignore[arg-type]
    desk.warm("b", "v")
    assert desk.arrive("first", "a") == ["quiesce v", "unload v", "desire a 1"]
    desk.tell(EngineUnloaded("v"), ReplicaStarted("a", "u", "n"))
    assert desk.tell(ReplicaReady("u")) == ["grant first u"]
    desk.release("first")
    desk.loads.clear()
    return desk


def test_a_swap_takes_one_decision_for_each_step() -> None:
    desk = two()
    assert (desk.state("u"), desk.state("v")) == ("READY", "ASLEEP")
    assert desk.arrive("b1", "b") == ["quiesce u", "unload u"]
    assert (desk.state("u"), desk.loads) == ("UNLOADING", []), "its memory is not free yet"
    assert desk.tell(EngineUnloaded("u")) == []
    assert [(each.replica, each.devices) for each in desk.loads] == [("v", (0,))]
    assert desk.tell(ReplicaReady("v")) == ["grant b1 v"]
    assert desk.ledger.desired == {"a": 1, "b": 1}, "Serve heard nothing of all this"
    rows = desk.ledger.snapshot().models
    assert {name: (row.state, row.status) for name, row in rows.items()} == {
        "a": ("unloaded", "sleeping"),
        "b": ("loaded", "loaded"),
    }


def test_the_last_release_ends_the_engine() -> None:
    desk = two(bound_s=(1.0, 1.0, 1.0), load_prior_s=0.0)
    desk.arrive("a1", "a")
    assert desk.arrive("b1", "b", priority=1) == ["quiesce u"]
    assert desk.state("u") == "DRAINING"
    assert desk.release("a1") == ["unload u"]
    desk.tell(EngineUnloaded("u"))
    assert [each.replica for each in desk.loads] == ["v"]


def test_a_process_starts_while_its_victim_drains() -> None:
    desk = Desk(model("a"), model("b"), max_asleep=None, bound_s=(1.0, 1.0, 1.0), load_prior_s=0.0)
    desk.arrive("a1", "a")
    desk.boot("a", "u")
    assert desk.arrive("b1", "b", priority=1) == ["quiesce u", "desire b 1"]
    desk.tell(ReplicaStarted("b", "v", "n"))
    assert (desk.state("v"), [each.replica for each in desk.loads]) == ("ASLEEP", ["u"])
    assert desk.release("a1") == ["unload u"]
    desk.tell(EngineUnloaded("u"))
    assert desk.loads[-1].replica == "v"


def test_an_engine_that_does_not_end_costs_its_replica() -> None:
    desk = two()
    desk.arrive("b1", "b")
    assert desk.at(desk.now + 29.9) == []
    assert desk.at(desk.now + 0.1) == ["end u"]
    assert desk.at(desk.now + 30.0) == ["end u"]
    assert desk.gone("u") == ["desire a 0"]
    assert [each.replica for each in desk.loads] == ["v"]


def test_an_end_that_nobody_ordered_is_ignored() -> None:
    desk = two()
    desk.tell(EngineUnloaded("u"), EngineUnloaded("v"), EngineUnloaded("nobody"))
    assert (desk.state("u"), desk.state("v")) == ("READY", "ASLEEP")


def test_a_failed_load_leaves_a_replica_and_a_free_device() -> None:
    desk = two()
    desk.arrive("b1", "b")
    desk.tell(EngineUnloaded("u"))
    assert desk.tell(ReplicaFailed("v", "no such file")) == ["reject b1 ModelUnavailable"]
    assert desk.state("v") == "ASLEEP"
    desk.arrive("a1", "a")
    assert desk.loads[-1].replica == "u"
    assert desk.ledger.desired == {"a": 1, "b": 1}


def test_a_load_that_takes_too_long_is_ended() -> None:
    desk = two()
    desk.arrive("b1", "b")
    desk.tell(EngineUnloaded("u"))
    assert desk.at(desk.now + 120.0) == ["reject b1 BackendTimeout", "unload v"]
    assert desk.state("v") == "UNLOADING"
    assert desk.ledger.model("b").leaving == 1  # type: ignore[union-attr]
    desk.tell(EngineUnloaded("v"))
    assert desk.ledger.model("b").leaving == 0  # type: ignore[union-attr]


def test_a_dead_engine_loads_again_in_place() -> None:
    desk = two()
    desk.arrive("a1", "a")
    desk.arrive("a2", "a")
    desk.tell(EngineDied("u", "signal 11"))
    assert [(each.replica, each.devices) for each in desk.loads] == [("u", (0,))]
    assert desk.tell(ReplicaReady("u")) == ["grant a2 u"]


def test_the_third_death_is_the_last_and_its_device_is_free() -> None:
    desk = two()
    for _ in range(3):
        desk.tell(EngineDied("u", "signal 11"))
        desk.at(desk.now + 5.0)
        desk.tell(ReplicaReady("u"))
    desk.tell(EngineUnloaded("u"))
    assert desk.state("u") == "ASLEEP"
    desk.arrive("b1", "b")
    assert desk.loads[-1].replica == "v"


def test_an_engine_that_dies_while_it_drains_makes_room_at_once() -> None:
    desk = two(bound_s=(1.0, 1.0, 1.0), load_prior_s=0.0)
    desk.arrive("a1", "a")
    desk.arrive("b1", "b", priority=1)
    desk.at(desk.now + 60.0)
    desk.tell(EngineDied("u", "signal 11"))
    assert (desk.state("u"), desk.loads[-1].replica) == ("ASLEEP", "v")


def test_a_sleeper_that_dies_is_started_again_on_demand() -> None:
    desk = two()
    assert desk.gone("v") == ["desire b 0"]
    assert desk.arrive("b1", "b") == ["quiesce u", "unload u", "desire b 1"]


def test_the_least_recently_used_sleepers_go() -> None:
    names = ["a", "b", "c", "d"]
    desk = Desk(*(model(name) for name in names), max_asleep=2)
    for name in names:
        desk.arrive(f"r-{name}", name)
        loaded = [each.replica for each in desk.ledger.snapshot().replicas if each.state == "UNLOADING"]
        desk.tell(*(EngineUnloaded(each or "") for each in loaded))
        desk.tell(ReplicaStarted(name, name, "n"), ReplicaReady(name))
        desk.release(f"r-{name}")
    assert [desk.state(name) for name in names] == ["STOPPING", "ASLEEP", "ASLEEP", "READY"]
    assert desk.ledger.desired == {"a": 0, "b": 1, "c": 1, "d": 1}
    assert desk.ledger.snapshot().models["a"].state == "unloaded"
    desk.arrive("again", "a")
    assert desk.ledger.desired["a"] == 0, "nothing is started before the old one has gone"
    assert desk.gone("a") == ["quiesce d", "unload d", "desire a 1"]


def test_as_many_sleep_as_the_hosts_have_room_for() -> None:
    nodes = {"n": NodeSpec("n", gpus=1, host_memory_mib=800)}
    desk = Desk(model("a"), model("b"), model("c"), nodes=nodes, max_asleep=None)
    desk.warm("a", "u")
    desk.arrive("b1", "b")
    desk.tell(EngineUnloaded("u"))
    desk.boot("b", "v")
    assert desk.state("u") == "ASLEEP"
    desk.release("b1")
    desk.arrive("c1", "c")
    assert desk.tell(EngineUnloaded("v")) == ["desire a 0"]
    assert (desk.state("u"), desk.state("v")) == ("STOPPING", "ASLEEP")


def test_a_sleeper_ends_after_its_timeout() -> None:
    desk = Desk(model("a"), model("b", sleep_timeout_s=50.0), max_asleep=None)
    desk.warm("b", "v")
    desk.arrive("a1", "a")
    desk.tell(EngineUnloaded("v"))
    desk.boot("a", "u")
    assert desk.at(49.9) == []
    assert desk.ledger.next_deadline() == 50.0
    assert desk.at(50.0) == ["desire b 0"]
    assert desk.state("v") == "STOPPING"


def test_a_sleeper_that_is_waited_for_stays() -> None:
    desk = two(max_asleep=1)
    desk.arrive("b1", "b")
    assert desk.tell(EngineUnloaded("u")) == []
    assert (desk.state("u"), desk.state("v")) == ("ASLEEP", "LOADING")


def test_one_that_serve_would_not_stop_first_stays() -> None:
    desk = Desk(model("a", max_replicas=2, idle_timeout_s=10.0), gpus=2, max_asleep=0)
    wide = replace(desk.spec, max_asleep=1)
    desk.tell(ConfigChanged(wide), LoadRequested("a", 2))
    desk.boot("a", "old")
    desk.boot("a", "new")
    desk.arrive("r1", "a")
    desk.arrive("r2", "a")
    busy = desk.grants["r1"].replica
    idle = {"old": "new", "new": "old"}[busy]
    desk.release("r2")
    desk.tell(EngineDied(idle, "x"), ReplicaFailed(idle, "y"))
    desk.tell(ConfigChanged(replace(wide, max_asleep=None)), ConfigChanged(wide))
    assert desk.state(idle) == "ASLEEP"
    assert desk.ledger.desired == {"a": 2}


def test_an_operators_unload_ends_with_the_engine() -> None:
    desk = two()
    assert desk.tell(UnloadRequested("a")) == ["quiesce u", "unload u"]
    view = desk.ledger.model("a")
    assert view is not None
    assert (view.state, view.unloading, view.replicas) == ("unloading", True, 1)
    desk.tell(EngineUnloaded("u"))
    view = desk.ledger.model("a")
    assert view is not None
    assert (view.state, view.unloading, view.replicas) == ("unloaded", False, 0)


def test_a_load_that_is_taken_back_ends_in_its_replica() -> None:
    desk = two()
    desk.arrive("b1", "b")
    desk.tell(EngineUnloaded("u"))
    assert desk.tell(UnloadRequested("b")) == ["reject b1 ModelUnavailable", "unload v"]
    desk.tell(EngineUnloaded("v"))
    assert desk.state("v") == "ASLEEP"


def test_a_changed_model_loads_what_it_is_now() -> None:
    desk = two()
    changed = replace(
        desk.spec, models={**desk.spec.models, "a": replace(desk.spec.models["a"], revision="2", slots=3)}
    )
    assert desk.tell(ConfigChanged(changed)) == ["quiesce u", "unload u"]
    desk.tell(EngineUnloaded("u"))
    desk.arrive("a1", "a")
    desk.tell(ReplicaReady("u"))
    assert desk.arrive("a2", "a", slots=2) == ["grant a2 u"]


def test_a_removed_model_leaves_nothing() -> None:
    desk = two()
    without = replace(desk.spec, models={"b": desk.spec.models["b"]})
    assert desk.tell(ConfigChanged(without)) == ["quiesce u", "unload u"]
    assert desk.tell(EngineUnloaded("u")) == ["desire a 0"]
    assert desk.gone("u") == []
    assert "a" not in desk.ledger.desired


def test_only_what_is_loaded_counts_as_resident() -> None:
    desk = Desk(model("a"), model("b"), gpus=2, capacity=1, max_asleep=None)
    desk.warm("a", "u")
    desk.arrive("b1", "b")
    desk.tell(EngineUnloaded("u"))
    assert desk.boot("b", "v") == ["grant b1 v"]


def test_a_manual_model_that_sleeps_is_not_loaded() -> None:
    desk = Desk(model("a", manual=True), max_asleep=None)
    desk.tell(LoadRequested("a", 1))
    desk.boot("a", "u")
    desk.tell(UnloadRequested("a"), EngineUnloaded("u"))
    assert desk.arrive("r", "a") == ["reject r ModelNotLoaded"]


# --- several nodes ----------------------------------------------------------------------------------------------------

NODES = {"n": NodeSpec("n", gpus=1), "m": NodeSpec("m", gpus=1)}


def test_a_model_that_sleeps_elsewhere_starts_where_there_is_room() -> None:
    desk = Desk(model("a"), model("b", devices=("n/0",), pinned=True), nodes=NODES, max_asleep=None)
    desk.arrive("a1", "a")
    desk.boot("a", "u", "n")
    desk.release("a1")
    desk.arrive("b1", "b")
    desk.tell(EngineUnloaded("u"))
    desk.boot("b", "v", "n")
    assert desk.arrive("a2", "a") == ["desire a 2"]
    assert desk.boot("a", "w", "m") == ["grant a2 w"]
    desk.tell(NodesChanged({"m": NODES["m"]}))
    assert desk.state("u") == "ASLEEP", "Serve might stop the one that serves"
    desk.gone("w")
    assert desk.state("u") == "STOPPING"


def test_one_that_starts_elsewhere_than_planned_loads_there_or_sleeps() -> None:
    desk = Desk(model("a"), model("b", devices=("m/0",), pinned=True), nodes=NODES, max_asleep=None)
    desk.arrive("b1", "b")
    desk.boot("b", "v", "m")
    desk.arrive("a1", "a")
    desk.tell(ReplicaStarted("a", "u", "m"))
    assert desk.state("u") == "ASLEEP", "its node has no room"
    assert desk.ledger.desired["a"] == 2
    assert desk.boot("a", "w", "n") == ["grant a1 w"]


def test_one_that_starts_on_another_free_node_loads_there() -> None:
    desk = Desk(model("a"), nodes=NODES, max_asleep=None)
    desk.arrive("a1", "a")
    planned = desk.ledger.snapshot().replicas[0].node
    other = {"n": "m", "m": "n"}[planned]
    desk.tell(ReplicaStarted("a", "u", other))
    assert [each.replica for each in desk.loads] == ["u"]


def test_a_process_for_an_engine_to_come_may_start_elsewhere_too() -> None:
    only = [model(name, devices=("n/0",)) for name in "ab"]
    desk = Desk(*only, nodes=NODES, max_asleep=None, bound_s=(1.0, 1.0, 1.0), load_prior_s=0.0)
    desk.arrive("a1", "a")
    desk.boot("a", "u", "n")
    assert desk.arrive("b1", "b", priority=1) == ["quiesce u", "desire b 1"]
    desk.tell(ReplicaStarted("b", "w", "m"))
    assert desk.state("w") == "ASLEEP"
    desk.release("a1")
    assert desk.tell(EngineUnloaded("u")) == ["desire b 2"], "it can load on the other node only"


def test_one_of_two_sleepers_that_is_waited_for_stays_and_the_other_goes() -> None:
    desk = Desk(model("a"), model("b"), model("c", num_gpus=0.0, manual=True), max_asleep=1)
    desk.warm("b", "v")
    desk.arrive("a1", "a")
    desk.tell(EngineUnloaded("v"))
    desk.boot("a", "u")
    desk.tell(LoadRequested("c", 1))
    desk.boot("c", "w")
    desk.arrive("b1", "b")
    desk.tell(UnloadRequested("c"))
    assert desk.tell(EngineUnloaded("w")) == ["desire c 0"], "though the other one has slept for longer"
    assert desk.state("v") == "ASLEEP"


# --- unasked, and after a restart -----------------------------------------------------------------------------------


def test_a_process_that_nobody_asked_for_sleeps_or_goes() -> None:
    desk = Desk(model("a"), max_asleep=None)
    desk.tell(ReplicaStarted("a", "u", "n"))
    assert (desk.state("u"), desk.loads, desk.out_words()) == ("ASLEEP", [], ["desire a 1"])
    desk.tell(ReplicaStarted("a", "v", "n"))
    assert sorted([desk.state("u") or "", desk.state("v") or ""]) == ["ASLEEP", "STOPPING"]


def test_no_count_rises_for_an_unasked_process_beside_one_that_stops() -> None:
    desk = Desk(model("a"), model("b"), max_asleep=0)
    sleeping = replace(desk.spec, max_asleep=1)
    desk.tell(ConfigChanged(sleeping))
    desk.warm("b", "v")
    desk.arrive("a1", "a")
    desk.tell(EngineUnloaded("v"))
    desk.boot("a", "u")
    desk.tell(ConfigChanged(replace(sleeping, models={"a": desk.spec.models["a"]})))
    assert desk.state("v") == "STOPPING"
    desk.tell(ConfigChanged(sleeping))
    assert desk.tell(ReplicaStarted("b", "w", "n")) == ["desire b 0"]
    assert (desk.state("v"), desk.state("w")) == ("STOPPING", "STOPPING")


def test_an_engine_that_nobody_knows_of_is_ended() -> None:
    desk = two()
    assert desk.tell(ReplicaReady("v")) == ["unload v"]
    assert desk.state("v") == "UNLOADING"
    desk.tell(EngineUnloaded("v"))
    assert desk.state("v") == "ASLEEP"


def test_what_an_engine_has_that_nobody_knows_of_is_given_to_nobody() -> None:
    """It was taken for one that had failed: that was told twice, and once too late."""
    desk = Desk(model("a"), model("b"), gpus=1, max_asleep=None)
    desk.warm("b", "v")
    desk.tell(ReplicaFailed("v", "told late"), ReplicaReady("v", devices=("0",)))
    assert (desk.state("v"), desk.devices("v")) == ("UNLOADING", (0,))
    assert desk.arrive("a1", "a") == ["desire a 1"]
    desk.tell(ReplicaStarted("a", "u", "n"))
    assert not [each for each in desk.loads if each.replica == "u"]
    desk.tell(EngineUnloaded("v"))
    assert [each.replica for each in desk.loads if each.replica == "u"]


@pytest.mark.parametrize("loading", [False, True])
def test_an_unasked_process_that_loads_is_accounted_for(loading: bool) -> None:
    desk = Desk(model("a"), max_asleep=None)
    desk.tell(ReplicaStarted("a", "u", "n", loading=loading))
    assert desk.state("u") == ("LOADING" if loading else "ASLEEP")


def test_a_restarted_ledger_learns_of_engines_that_are_absent_loading_or_ending() -> None:
    names = ["a", "b", "c"]
    desk = Desk(*(model(name) for name in names), gpus=3, max_asleep=None, recovering_until=2.0)
    desk.tell(ReplicaStarted("a", "u", "n", 1.0))
    desk.tell(ReplicaStarted("b", "v", "n", 1.0, True, (2,)))
    desk.tell(ReplicaStarted("c", "w", "n", 1.0, False, (0,), True))
    assert [desk.state(each) for each in "uvw"] == ["ASLEEP", "LOADING", "UNLOADING"]
    assert desk.at(2.0) == ["unload w", "desire a 1", "desire b 1", "desire c 1"], "what was told before may be lost"
    desk.tell(EngineUnloaded("w"))
    assert (desk.state("w"), desk.loads) == ("ASLEEP", [])
