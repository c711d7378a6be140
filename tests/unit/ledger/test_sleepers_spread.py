"""Replicas that stay, on several nodes: Ray chooses where their processes start, and the ledger makes do with it."""

from __future__ import annotations

from cluster.ledger.events import ReplicaReady, ReplicaStarted
from cluster.ledger.specs import NodeSpec
from tests.unit.ledger.desk import Desk, model

NODES = {name: NodeSpec(name, gpus=1, cpus=4.0) for name in ("n1", "n2")}


def test_two_sleepers_on_one_node_do_not_keep_a_model_off_the_other_node() -> None:
    """Ray has started both processes of model a on n1, where somebody else has the device."""
    desk = Desk(model("p", pinned=True, devices=("n1/0",)), model("a"), nodes=NODES, max_asleep=None)
    desk.warm("p", "P", "n1")
    assert desk.arrive("a1", "a") == ["desire a 1"]
    assert desk.tell(ReplicaStarted("a", "A1", "n1", 1.0)) == ["desire a 2"]
    assert desk.tell(ReplicaStarted("a", "A2", "n1", 2.0)) == []
    assert desk.at(1.0) == ["desire a 1"], "the newer one, which Serve stops first"
    assert (desk.state("A1"), desk.state("A2")) == ("ASLEEP", "STOPPING")
    assert desk.at(2.0) == []
    assert desk.gone("A2") == ["desire a 2"]
    assert desk.boot("a", "A3", "n2") == ["grant a1 A3"]


def test_two_sleepers_on_one_node_stay_where_no_other_could_hold_their_model() -> None:
    models = model("p", pinned=True, devices=("n1/0",)), model("a", devices=("n1/0",))
    desk = Desk(*models, nodes=NODES, max_asleep=None, recovering_until=2.0)
    desk.tell(ReplicaStarted("p", "P", "n1", 1.0, True, (0,)), ReplicaReady("P"))
    desk.tell(ReplicaStarted("a", "A1", "n1", 1.0), ReplicaStarted("a", "A2", "n1", 2.0))
    desk.at(2.0)
    assert desk.arrive("a1", "a") == []
    assert desk.at(3.0) == []
    assert (desk.state("A1"), desk.state("A2")) == ("ASLEEP", "ASLEEP")


def test_of_two_nodes_that_are_not_the_head_both_sleepers_go_for_serve_may_stop_either() -> None:
    desk = Desk(model("a", max_replicas=2), nodes=NODES, max_asleep=1, recovering_until=2.0)
    desk.tell(ReplicaStarted("a", "A1", "n1", 1.0), ReplicaStarted("a", "A2", "n2", 2.0))
    assert desk.at(2.0) == ["desire a 0"]
    assert (desk.state("A1"), desk.state("A2")) == ("STOPPING", "STOPPING")


def test_a_sleeper_stays_beside_one_that_serves_and_that_serve_may_stop_in_its_stead() -> None:
    desk = Desk(model("a", max_replicas=2), model("b"), nodes=NODES, max_asleep=1, recovering_until=2.0)
    desk.tell(ReplicaStarted("a", "A1", "n1", 1.0, True, (0,)), ReplicaReady("A1"))
    desk.tell(ReplicaStarted("a", "A2", "n2", 2.0), ReplicaStarted("b", "B", "n2", 3.0))
    assert desk.at(2.0) == ["desire b 0", "desire a 2"], "b's goes, though it came last"
    assert desk.state("A2") == "ASLEEP"


def test_too_many_sleepers_stay_while_serve_may_stop_one_that_serves_in_their_stead() -> None:
    desk = Desk(model("a", max_replicas=3), nodes=NODES, max_asleep=1, recovering_until=2.0)
    desk.tell(ReplicaStarted("a", "A1", "n1", 1.0, True, (0,)), ReplicaReady("A1"))
    desk.tell(ReplicaStarted("a", "A2", "n2", 2.0), ReplicaStarted("a", "A3", "n2", 3.0))
    assert desk.at(2.0) == ["desire a 3"]
    assert (desk.state("A2"), desk.state("A3")) == ("ASLEEP", "ASLEEP")
