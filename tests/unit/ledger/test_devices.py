"""Devices by assignment: what an engine is told is its own, wherever Ray started its replica."""

from __future__ import annotations

import pytest

from cluster.ledger.events import (
    LoadRequested,
    NodesChanged,
    ReplicaReady,
    ReplicaStarted,
)
from cluster.ledger.specs import NodeSpec
from tests.unit.ledger.desk import Desk, model

UUIDS = ("GPU-a", "GPU-b")
NODES = {
    "n1": NodeSpec("n1", gpus=2, device_uuids=UUIDS, hosts=("left", "10.0.0.1")),
    "n2": NodeSpec("n2", gpus=2, device_uuids=("GPU-c", "GPU-d"), hosts=("right",)),
}


@pytest.mark.parametrize(
    ("devices", "node", "index"),
    [
        (("1",), "n1", 1),
        (("n2/1",), "n2", 1),
        (("right/0",), "n2", 0),
        (("GPU-d",), "n2", 1),
        (("10.0.0.1/GPU-b",), "n1", 1),
        (("nowhere/0", "right/1"), "n2", 1),
    ],
)
def test_a_model_stands_only_where_it_is_bound_to(devices: tuple[str, ...], node: str, index: int) -> None:
    desk = Desk(model("a", devices=devices), nodes=NODES)
    desk.arrive("r1", "a")
    desk.tell(ReplicaStarted("a", "u", node))
    assert desk.loads[0].devices == (index,)


@pytest.mark.parametrize("devices", [("7",), ("n1/7",), ("nowhere/0",), ("GPU-x",), ("n1/GPU-c",)])
def test_a_device_that_no_machine_has_is_refused_like_what_is_too_large(devices: tuple[str, ...]) -> None:
    desk = Desk(model("a", devices=devices), nodes=NODES)
    assert desk.arrive("r1", "a") == ["reject r1 MemoryBudgetExceeded"]
    assert f"is bound to GPU {devices[0]}, which no machine" in desk.out[-1].message  # type: ignore[union-attr]


def test_more_devices_than_it_is_bound_to() -> None:
    desk = Desk(model("a", num_gpus=2.0, devices=("n1/0",)), nodes=NODES)
    assert desk.arrive("r1", "a") == ["reject r1 MemoryBudgetExceeded"]
    desk = Desk(model("a", num_gpus=2.0, devices=("0", "1"), max_replicas=3), nodes=NODES)
    assert desk.tell(LoadRequested("a", 3)) == ["refuse a MemoryBudgetExceeded"]


def test_a_uuid_is_waited_for_until_the_drivers_were_asked() -> None:
    desk = Desk(model("a", devices=("GPU-b",)), gpus=2)
    assert desk.arrive("r1", "a") == []
    assert desk.tell(NodesChanged({"n": NodeSpec("n", gpus=2, device_uuids=UUIDS)})) == ["desire a 1"]
    desk.tell(ReplicaStarted("a", "u", "n"))
    assert desk.loads[0].devices == (1,)


def test_without_gpus_the_binding_means_nothing() -> None:
    desk = Desk(model("a", num_gpus=0.0, devices=("7",)), nodes=NODES)
    assert desk.arrive("r1", "a") == ["desire a 1"]
    desk.tell(ReplicaStarted("a", "u", "n1"))
    assert desk.loads[0].devices == ()


def test_room_is_made_on_the_device_that_it_is_bound_to() -> None:
    desk = Desk(model("a"), model("b"), model("c", devices=("1",)), gpus=2)
    desk.warm("a", "a1")
    desk.now = 1.0
    desk.warm("b", "b1")
    assert (desk.devices("a1"), desk.devices("b1")) == ((0,), (1,))
    assert desk.arrive("c1", "c") == ["quiesce b1", "desire b 0"], "though a was idle for longer"


def test_bound_models_of_a_sharing_group_meet_where_both_may_be() -> None:
    share = {"num_gpus": 0.5, "group": "g", "group_share": True}
    desk = Desk(model("a", devices=("1",), **share), model("b", devices=("0", "1"), **share), gpus=2)
    desk.warm("a", "a1")
    desk.warm("b", "b1")
    assert desk.devices("b1") == (1,)


def test_started_elsewhere_it_gets_devices_of_that_node() -> None:
    nodes = {"n1": NodeSpec("n1", gpus=1), "n2": NodeSpec("n2", gpus=3)}
    desk = Desk(model("a"), model("b"), nodes=nodes)
    desk.arrive("a1", "a")
    desk.arrive("b1", "b")
    desk.tell(ReplicaStarted("a", "u", "n2"), ReplicaStarted("b", "v", "n2"))
    assert sorted(each.devices for each in desk.loads) == [(0,), (1,)]


def test_two_that_ray_exchanged_are_both_planned_anew() -> None:
    """Each turns up where the other was planned: for a moment both nodes seem full."""
    nodes = {"n1": NodeSpec("n1", gpus=1), "n2": NodeSpec("n2", gpus=1)}
    desk = Desk(model("a"), model("b"), nodes=nodes)
    desk.arrive("a1", "a")
    desk.arrive("b1", "b")
    desk.tell(ReplicaStarted("a", "u", "n2"), ReplicaStarted("b", "v", "n1"))
    assert [(each.replica, each.devices) for each in desk.loads] == [("u", (0,)), ("v", (0,))]
    assert desk.tell(ReplicaReady("u"), ReplicaReady("v")) == ["grant a1 u", "grant b1 v"]


def test_plans_step_aside_for_processes_on_their_devices() -> None:
    """Planned one on n1 and two on n2, Ray starts others there: what was planned on a taken device moves."""
    nodes = {"n1": NodeSpec("n1", gpus=1), "n2": NodeSpec("n2", gpus=2)}
    desk = Desk(model("a"), model("b"), model("c"), nodes=nodes)
    for each in "abc":
        desk.arrive(f"{each}1", each)
    desk.tell(ReplicaStarted("a", "u", "n2"), ReplicaStarted("b", "v", "n2"), ReplicaStarted("c", "w", "n1"))
    assert [(each.replica, each.devices) for each in desk.loads] == [("u", (0,)), ("v", (1,)), ("w", (0,))]


def test_where_no_device_is_free_nothing_is_loaded() -> None:
    """Ray started it where the book has no room: to load it would hand out the same device twice."""
    nodes = {"n1": NodeSpec("n1", gpus=1), "n2": NodeSpec("n2", gpus=1)}
    desk = Desk(model("a"), model("b"), nodes=nodes)
    desk.warm("b", "v", "n2")
    desk.loads.clear()
    desk.arrive("a1", "a")
    assert desk.tell(ReplicaStarted("a", "u", "n2")) == ["desire a 0"]
    assert (desk.state("u"), desk.loads) == ("STOPPING", [])
    assert desk.gone("u") == []
    assert desk.at(1.0) == ["desire a 1"], "and it is tried again"


def test_a_group_is_kept_apart_on_the_devices_really_given() -> None:
    half = {"num_gpus": 0.5, "group": "g"}
    nodes = {"n1": NodeSpec("n1", gpus=1), "n2": NodeSpec("n2", gpus=1)}
    desk = Desk(model("a", **half), model("b", **half), nodes=nodes)
    desk.warm("a", "u", "n1")
    desk.loads.clear()
    desk.arrive("b1", "b")
    desk.tell(ReplicaStarted("b", "v", "n1"))
    assert (desk.state("v"), desk.loads) == ("STOPPING", [])


def test_on_a_machine_that_was_not_heard_of_yet_each_gets_a_device_of_its_own() -> None:
    desk = Desk(model("a"), model("b"), nodes={}, recovering_until=2.0)
    desk.tell(ReplicaStarted("a", "u", "new"), ReplicaStarted("b", "v", "new"))
    desk.tell(NodesChanged({"new": NodeSpec("new", gpus=2)}))
    desk.at(2.0)
    assert sorted(each.devices for each in desk.loads) == [(0,), (1,)]


# --- what engines say that they have ----------------------------------------------------------------------------------


@pytest.mark.parametrize("said", [("1",), ("GPU-b",), (" 1 ",)])
def test_after_a_restart_the_book_follows_what_the_engines_have(said: tuple[str, ...]) -> None:
    nodes = {"n": NodeSpec("n", gpus=2, device_uuids=UUIDS)}
    desk = Desk(model("a"), model("b"), nodes=nodes, recovering_until=2.0)
    desk.tell(ReplicaStarted("a", "u", "n", 1.0, True), ReplicaReady("u", devices=said))
    assert desk.devices("u") == (1,)
    desk.at(2.0)
    desk.arrive("b1", "b")
    desk.boot("b", "v")
    assert desk.loads[-1].devices == (0,)


@pytest.mark.parametrize("said", [None, (), ("MIG-7",), ("0", "1"), ("",)])
def test_what_cannot_be_told_changes_nothing(said: tuple[str, ...] | None) -> None:
    desk = Desk(model("a"), gpus=2)
    desk.arrive("r1", "a")
    desk.tell(ReplicaStarted("a", "u", "n"), ReplicaReady("u", devices=said))
    assert desk.devices("u") == (0,)
    assert desk.ledger._pool.replicas["u"].devices == said


def test_an_engine_on_another_device_than_told_is_booked_there() -> None:
    desk = Desk(model("a"), model("b"), gpus=2)
    desk.warm("b", "v")
    desk.arrive("r1", "a")
    desk.tell(ReplicaStarted("a", "u", "n"), ReplicaReady("u", devices=("0",)))
    assert desk.devices("u") == desk.devices("v") == (0,)
    desk.tell(ReplicaStarted("b", "x", "n"))


def test_a_device_beyond_those_that_the_node_is_known_to_have() -> None:
    desk = Desk(model("a"), gpus=1, recovering_until=2.0)
    desk.tell(ReplicaStarted("a", "u", "n", 1.0, True), ReplicaReady("u", devices=("3",)))
    assert desk.devices("u") == (3,)


def test_malformed_devices_are_ignored() -> None:
    desk = Desk(model("a"))
    desk.arrive("r1", "a")
    desk.tell(ReplicaStarted("a", "u", "n"), ReplicaReady("u", devices=(0,)))  # type: ignore[arg-type]
    assert desk.state("u") == "LOADING"
    desk.tell(ReplicaReady("u", -1))
    assert desk.state("u") == "LOADING"
