"""What the ledger tells those who watch: every transition, why a replica drains, and every swap."""

from __future__ import annotations

import dataclasses

from cluster.ledger.events import (
    ConfigChanged,
    LoadRequested,
    NodesChanged,
    ReplicaFailed,
    ReplicaReady,
    ReplicaStarted,
    UnloadRequested,
)
from cluster.ledger.specs import NodeSpec, ServerSpec
from cluster.ledger.transitions import Because, Moved, SwapBegun
from tests.unit.ledger.desk import Desk, model


def causes(desk: Desk) -> list[str]:
    return [each.cause for each in desk.ledger.transitions if isinstance(each, Moved)]


def reasons(desk: Desk) -> list[str]:
    """Why replicas drain, or are taken back, by the last event."""
    return [each.reason for each in desk.ledger.transitions if isinstance(each, Moved) and each.reason]


def moves(desk: Desk) -> list[Moved]:
    return [each for each in desk.ledger.transitions if isinstance(each, Moved)]


def swaps(desk: Desk) -> list[SwapBegun]:
    return [each for each in desk.ledger.transitions if isinstance(each, SwapBegun)]


def test_the_life_of_a_replica_is_told():
    desk = Desk(model("a", idle_timeout_s=5.0))
    desk.arrive("r", "a")
    (placed,) = desk.ledger.transitions
    assert isinstance(placed, Moved)
    assert (placed.model, placed.replica, placed.node, placed.devices) == ("a", None, "n", (0,))
    assert (placed.before.name, placed.after.name, placed.cause) == ("COLD", "STARTING", "placed")
    desk.tell(ReplicaStarted("a", "u", "n"))
    announced, assigned = desk.ledger.transitions
    assert isinstance(announced, Moved)
    assert (announced.record, announced.replica, announced.cause) == (placed.record, "u", "announced")
    assert isinstance(assigned, Moved)
    assert (assigned.after.name, assigned.cause) == ("LOADING", "assigned")
    desk.tell(ReplicaReady("u"))
    assert causes(desk) == ["loaded"]
    desk.release("r")
    assert causes(desk) == []
    desk.at(5.0)
    assert (causes(desk), reasons(desk)) == (["quiesced", "dismissed"], ["idle_timeout"])
    desk.gone("u")
    assert causes(desk) == ["gone"]


def test_every_start_and_every_drain_says_why():
    desk = Desk(model("a"), model("b", min_replicas=1), model("c"), gpus=3)
    desk.at(0.0)
    assert [(each.model, each.because) for each in moves(desk)] == [("b", Because("kept"))]
    desk.arrive("r", "a")
    assert [each.because for each in moves(desk)] == [Because("demand", "r")]
    desk.tell(LoadRequested("c", 1))
    assert [each.because for each in moves(desk)] == [Because("operator")]
    desk.boot("c", "u")
    assert [each.because for each in moves(desk)] == [None], "loaded it has by itself"
    desk.tell(UnloadRequested("c"))
    assert [each.because for each in moves(desk)] == [Because("operator"), None]


def test_a_promise_to_an_operators_load_has_no_waiter():
    desk = Desk(model("a"), model("b"))
    desk.warm("a", "u")
    desk.tell(LoadRequested("b", 1))
    assert swaps(desk) == [SwapBegun("b", ("u",), "idle", Because("idle", None, None, 0, ("u",)))]


def test_a_decision_that_moves_nothing_tells_nothing():
    desk = Desk(model("a", slots=2))
    desk.warm("a", "u")
    desk.arrive("r", "a")
    assert desk.ledger.transitions == []


def test_an_idle_victim_makes_room():
    desk = Desk(model("a"), model("b"))
    desk.warm("a", "u")
    desk.arrive("r", "b")
    because = Because("idle", "r", 40.0, 0, ("u",))
    assert swaps(desk) == [SwapBegun("b", ("u",), "idle", because)]
    assert [each.because for each in moves(desk)] == [because, because], "it drains and stops for that"
    assert reasons(desk) == ["idle"]


def test_a_busy_victim_goes_for_a_bound():
    desk = Desk(model("a"), model("b"), bound_s=(100.0, 100.0, 100.0))
    desk.warm("a", "u")
    desk.arrive("r", "a")
    desk.arrive("s", "b")
    assert swaps(desk) == []
    desk.at(100.0)
    (swap,) = swaps(desk)
    assert swap[:3] == ("b", ("u",), "bound")
    assert swap.because is not None
    assert swap.because[:3] == ("bound", "s", 0.0)
    assert swap.because.cost_s is not None
    assert swap.because.cost_s >= 0.0


def test_a_load_by_hand_takes_a_busy_place():
    desk = Desk(model("a"), model("b"))
    desk.warm("a", "u")
    desk.arrive("r", "a")
    desk.now = 100.0
    desk.tell(LoadRequested("b", 1))
    assert [each.reason for each in swaps(desk)] == ["operator"]


def test_why_a_replica_must_go():
    desk = Desk(model("a"), model("b"), gpus=2)
    desk.warm("a", "u")
    desk.warm("b", "v")
    desk.tell(UnloadRequested("a"))
    assert reasons(desk) == ["operator"]
    newer = {**desk.spec.models, "b": dataclasses.replace(desk.spec.models["b"], revision="2")}
    desk.tell(ConfigChanged(dataclasses.replace(desk.spec, models=newer)))
    assert reasons(desk) == ["config"]


def test_a_lost_node_drains():
    desk = Desk(model("a"), nodes={"n": NodeSpec("n", gpus=1)})
    desk.warm("a", "u")
    desk.tell(NodesChanged({"m": NodeSpec("m", gpus=1)}))
    assert reasons(desk) == ["lost_node"]


def test_surplus_and_what_nobody_asked_for():
    desk = Desk(model("a", max_replicas=2, idle_timeout_s=50.0), model("b"), gpus=3)
    desk.warm("a", "u")
    desk.tell(LoadRequested("a", 2))
    desk.boot("a", "v")
    desk.arrive("r", "a")
    desk.tell(ReplicaStarted("b", "w", "n"), ReplicaStarted("b", "x", "n"))
    assert reasons(desk) == ["unasked"]
    desk.at(100.0)
    assert "surplus" in reasons(desk) or "idle_timeout" in reasons(desk)


def test_an_order_that_fails_is_taken_back():
    desk = Desk(model("a", max_replicas=2), gpus=2)
    desk.tell(LoadRequested("a", 2))
    desk.boot("a", "u")
    desk.tell(ReplicaStarted("a", "v", "n"), ReplicaFailed("v", "no"))
    assert "operator" in reasons(desk)


def test_what_is_asked_often_is_cheap_to_ask():
    desk = Desk(model("a"), servers=(ServerSpec("http://one"),))
    desk.warm("a", "u")
    desk.arrive("r", "a")
    desk.arrive("s", "a", priority=1)
    brief = desk.ledger.briefs()["a"]
    assert (brief.state, brief.ready, brief.leases, brief.queued_by_class) == ("loaded", 1, 1, (1, 0, 0))
    assert (desk.ledger.model_of("u"), desk.ledger.model_of("x")) == ("a", None)
    assert [row.url for row in desk.ledger.servers()] == ["http://one"]
