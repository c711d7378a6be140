"""Which replica of a model Serve stops, and what the ledger may ask of it: no stream ends because a count fell."""

from __future__ import annotations

from dataclasses import replace

from cluster.ledger.events import (
    ConfigChanged,
    LoadRequested,
    NodesChanged,
    ReplicaFailed,
    ReplicaReady,
    ReplicaStarted,
    UnloadRequested,
)
from cluster.ledger.specs import NodeSpec
from tests.unit.ledger.desk import Desk, model


def nodes(*names: str, head: str = "", gpus: int = 1) -> dict[str, NodeSpec]:
    return {name: NodeSpec(name, gpus=gpus, cpus=8.0, is_head=name == head) for name in names}


def shared() -> Desk:
    """An older replica of B beside D, a newer one beside the pinned P, and both of them busy."""
    half = [model(name, num_gpus=0.5, pinned=name == "P", max_replicas=2) for name in "BDP"]
    desk = Desk(*half, model("C"), gpus=2)
    for request, name, replica in (("b1", "B", "old"), ("d", "D", "D1"), ("p", "P", "P1"), ("b2", "B", "new")):
        desk.arrive(request, name)
        desk.at(desk.now + 2.0)
        desk.boot(name, replica)
    assert [desk.devices(each) for each in ("old", "D1", "P1", "new")] == [(0,), (0,), (1,), (1,)]
    desk.release("d", "p")
    return desk


def test_an_older_replica_makes_room_only_together_with_the_newer_one() -> None:
    desk = shared()
    desk.arrive("c", "C")
    assert desk.at(desk.now + 599.0) == ["quiesce D1", "quiesce new", "quiesce old", "desire D 0"]
    assert desk.release("b1") == [], "Serve would stop the newer one, which streams"
    assert desk.release("b2") == ["desire B 0"]
    desk.gone("D1", "old", "new")
    assert desk.boot("C", "C1") == ["grant c C1"]


def test_what_could_not_leave_before_it_is_reopened_with_it() -> None:
    desk = shared()
    desk.arrive("c", "C", timeout=60.0)
    assert desk.at(desk.now + 59.0) == ["quiesce D1", "quiesce new", "quiesce old", "desire D 0"]
    assert desk.at(desk.now + 2.0) == ["reject c BackendTimeout", "reopen new", "reopen old"]
    assert desk.release("b1") == []
    assert desk.arrive("b3", "B") == ["grant b3 old"]


def test_a_failed_one_waits_for_a_newer_one_that_serves() -> None:
    desk = Desk(model("A", max_replicas=2), gpus=2)
    desk.arrive("r1", "A")
    desk.boot("A", "old")
    desk.arrive("r2", "A")
    desk.at(3.0)
    desk.boot("A", "new")
    assert desk.tell(ReplicaFailed("old", "why")) == [], "Serve would stop the newer one, which streams"
    assert desk.release("r2") == []
    assert desk.at(400.0) == ["quiesce new", "desire A 0"]


def test_a_failed_one_gives_no_room_while_a_newer_one_serves() -> None:
    desk = Desk(model("A", max_replicas=2), model("C"), gpus=2, bound_s=(9.0, 9.0, 9.0))
    desk.arrive("r1", "A")
    desk.boot("A", "old")
    desk.arrive("r2", "A")
    desk.at(3.0)
    desk.boot("A", "new")
    desk.tell(ReplicaFailed("old", "why"))
    assert desk.arrive("c", "C") == []
    assert desk.at(40.0) == ["quiesce new"], "both of them, or neither"
    assert desk.release("r2") == ["desire A 0"]


def spread(head: str = "", **more: object) -> Desk:
    """Two replicas of A, the older on node x and the newer on node y, and nobody asks for them."""
    desk = Desk(model("A", max_replicas=2, **more), model("C"), nodes=nodes("x", "y", head=head))
    desk.arrive("r1", "A")
    desk.arrive("r2", "A")
    desk.tell(ReplicaStarted("A", "ax", "x", 1.0), ReplicaReady("ax"))
    desk.at(3.0)
    desk.tell(ReplicaStarted("A", "ay", "y", 2.0), ReplicaReady("ay"))
    assert {each.replica for each in desk.grants.values()} == {"ax", "ay"}
    return desk


def held(desk: Desk, replica: str) -> str:
    return next(each.request for each in desk.grants.values() if each.replica == replica)


def test_on_the_head_node_a_newer_one_stays() -> None:
    desk = spread(head="y")
    desk.release("r1", "r2")
    assert desk.at(400.0) == ["quiesce ax", "quiesce ay", "desire A 0"]


def test_a_surplus_one_goes_where_serve_takes_it_from() -> None:
    desk = spread(head="y", idle_timeout_s=20.0)
    desk.release(held(desk, "ay"))
    assert desk.at(50.0) == ["quiesce ax"], "it goes in the stead of the idle one on the head node"
    assert desk.release(held(desk, "ax")) == ["desire A 1"]


def test_where_serve_may_stop_either_none_goes_alone() -> None:
    desk = spread(idle_timeout_s=20.0)
    desk.release(held(desk, "ay"))
    assert desk.at(100.0) == []
    desk.release(held(desk, "ax"))
    assert desk.at(115.0) == []
    assert desk.at(121.0) == ["quiesce ax", "quiesce ay", "desire A 0"]


def test_where_serve_may_stop_either_none_goes_for_a_floor() -> None:
    desk = spread(idle_timeout_s=20.0, min_replicas=1)
    desk.release("r1", "r2")
    assert desk.at(500.0) == []


def test_one_victim_of_two_nodes_takes_the_other_along() -> None:
    desk = spread(idle_timeout_s=0.0)
    desk.release("r1", "r2")
    desk.arrive("r3", "A")
    busy = desk.grants["r3"].replica
    assert desk.arrive("c", "C") == []
    assert sorted(desk.at(60.0)) == ["quiesce ax", "quiesce ay"]
    assert desk.release("r3") == ["desire A 0"]
    assert {busy} < {"ax", "ay"}


def test_a_lower_maximum_waits_where_serve_may_stop_either() -> None:
    desk = spread()
    fewer = replace(desk.spec, models=desk.spec.models | {"A": replace(desk.spec.models["A"], max_replicas=1)})
    assert desk.tell(ConfigChanged(fewer)) == []
    assert desk.tell(NodesChanged(nodes("x", "y", head="y"))) == ["quiesce ax"]


def test_an_order_that_failed_takes_back_what_serve_will_stop() -> None:
    desk = Desk(model("A", max_replicas=3), gpus=3)
    desk.arrive("r", "A")
    desk.boot("A", "one")
    desk.tell(LoadRequested("A", 3))
    desk.tell(ReplicaStarted("A", "two", "n"), ReplicaStarted("A", "three", "n"))
    assert desk.tell(ReplicaFailed("two", "why")) == ["desire A 1"]
    assert desk.state("one") == "READY"


def test_a_failed_one_waits_for_one_that_has_not_started() -> None:
    desk = Desk(model("A", max_replicas=2), gpus=2)
    desk.arrive("r1", "A")
    desk.boot("A", "old")
    assert desk.arrive("r2", "A") == ["desire A 2"]
    assert desk.tell(ReplicaFailed("old", "why")) == [], "Serve would stop the one that it is to start"
    assert desk.boot("A", "new") == ["grant r2 new"]


def test_one_that_nobody_asked_for_waits_for_one_that_serves() -> None:
    desk = Desk(model("A"), nodes=nodes("x", "y", head="y"))
    desk.arrive("r", "A")
    desk.boot("A", "ax", "x")
    assert desk.tell(ReplicaStarted("A", "ay", "y")) == ["desire A 2"], "that is what there is"
    assert (desk.state("ay"), desk.loads[-1].replica) == ("ASLEEP", "ax")
    desk.release("r")
    assert desk.at(400.0) == ["quiesce ax", "desire A 0"]


def test_what_another_claim_counts_on_is_not_reopened() -> None:
    desk = Desk(model("A", max_replicas=2, slots=1), model("C"), model("E"), gpus=2)
    desk.arrive("r1", "A")
    desk.boot("A", "old")
    desk.arrive("r2", "A")
    desk.at(3.0)
    desk.boot("A", "new")
    desk.arrive("c", "C", timeout=70.0)
    desk.arrive("e", "E")
    assert desk.at(60.0) == ["quiesce new", "quiesce old"]
    assert desk.at(73.0) == ["reject c BackendTimeout"], "the older one leaves after the newer one only"
    assert desk.release("r2") == ["desire A 1"]


def test_both_replicas_of_a_model_leave_for_a_bound_only_if_one_is_kept() -> None:
    desk = Desk(model("A", max_replicas=2, min_replicas=1), model("C", num_gpus=2.0), gpus=2)
    desk.boot("A", "old")
    desk.tell(LoadRequested("A", 2))
    desk.boot("A", "new")
    assert desk.arrive("c", "C") == []
    assert desk.at(58.0) == ["quiesce new", "quiesce old", "desire A 0"]


def test_one_that_comes_late_goes_in_the_stead_of_another_and_of_no_stream() -> None:
    """Its start was taken back, and Ray had made it all the same."""
    nodes = {"n1": NodeSpec("n1", gpus=1, cpus=8.0), "n2": NodeSpec("n2", gpus=2, cpus=8.0)}
    desk = Desk(model("A", slots=1, max_replicas=3), nodes=nodes)
    desk.arrive("a1", "A")
    desk.tell(ReplicaStarted("A", "A#1", "n2", 1.0, booked=(0,)), ReplicaReady("A#1"))
    desk.tell(LoadRequested("A", 3))
    desk.tell(ReplicaStarted("A", "A#2", "n2", 2.0, booked=(1,)))
    assert desk.tell(UnloadRequested("A")) == ["quiesce A#1", "desire A 1"]
    assert desk.tell(ReplicaStarted("A", "A#3", "n1", 3.0, booked=(0,))) == ["desire A 2"]
    assert desk.gone("A#3") == ["desire A 1"], "it holds nothing, and the one that was to stop still is"
    assert desk.gone("A#2") == []
    assert desk.release("a1") == ["desire A 0"]
