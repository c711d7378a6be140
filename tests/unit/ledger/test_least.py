"""No more than is needed: the fewest victims, the variant that can answer, the replica that is meant."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.ledger.books.placement import Node
from cluster.ledger.books.pool import Pool
from cluster.ledger.events import NodesChanged, ReplicaFailed, ReplicaReady, ReplicaStarted
from cluster.ledger.rules import eviction
from cluster.ledger.specs import NodeSpec
from tests.unit.ledger.desk import Desk, model


def resident(desk: Desk, *names: str) -> None:
    for name in names:
        desk.now += 1.0
        desk.warm(name, f"{name}#1")
    desk.now += 1.0


def test_one_victim_makes_room_and_capacity() -> None:
    pair = [model(name, num_gpus=0.4, group="apart") for name in ("left", "right")]
    desk = Desk(model("guest", num_gpus=0.4), *pair, capacity=2)
    resident(desk, "guest", "left")
    assert desk.arrive("r", "right") == ["quiesce left#1", "desire left 0"]


def test_one_victim_where_two_smaller_ones_would_do() -> None:
    desk = Desk(model("X", num_gpus=0.3), model("Y", num_gpus=0.3), model("Z", num_gpus=0.4), model("W", num_gpus=0.4))
    resident(desk, "X", "Y", "Z")
    desk.now = 100.0
    assert desk.arrive("r", "W") == ["quiesce Z#1", "desire Z 0"]


def test_two_long_idle_ones_rather_than_one_in_use_a_moment_ago() -> None:
    desk = Desk(model("X", num_gpus=0.3), model("Y", num_gpus=0.3), model("Z", num_gpus=0.4), model("W", num_gpus=0.4))
    resident(desk, "X", "Y")
    desk.now = 100.0
    desk.warm("Z", "Z#1")
    assert sorted(desk.arrive("r", "W")[:2]) == ["quiesce X#1", "quiesce Y#1"]


def test_two_where_no_single_one_is_enough() -> None:
    desk = Desk(model("X", num_gpus=0.5), model("Y", num_gpus=0.5), model("W"))
    resident(desk, "X", "Y")
    assert sorted(desk.arrive("r", "W")[:2]) == ["quiesce X#1", "quiesce Y#1"]


def test_capacity_is_no_reason_to_drain_a_busy_model_at_once() -> None:
    desk = Desk(model("A"), model("B"), gpus=2, capacity=1)
    desk.arrive("a1", "A")
    desk.boot("A", "A#1")
    desk.at(2.0)
    desk.release("a1")
    desk.arrive("a2", "A")
    desk.arrive("a3", "A")
    desk.at(12.0)
    assert desk.arrive("b1", "B") == []


def test_variant_that_failed_has_no_turn() -> None:
    desk = Desk(model("A", slots=9), model("B", slots=9), gpus=2, variants={"public": (("A", 3.0), ("B", 1.0))})
    desk.warm("B", "B#1")
    assert desk.arrive("r1", "public") == ["desire A 1"]
    said = desk.tell(ReplicaStarted("A", "A#1", "n"), ReplicaFailed("A#1", "no"))
    assert "grant r1 B#1" in said, "who waited for it is answered by the other"
    for index in range(2, 6):
        assert desk.arrive(f"r{index}", "public") == [f"grant r{index} B#1"]
    desk.gone("A#1")
    desk.at(700.0)
    assert "desire A 1" in [word for index in range(6, 9) for word in desk.arrive(f"r{index}", "public")]


def test_variants_that_all_failed_say_so() -> None:
    desk = Desk(model("A"), variants={"public": (("A", 1.0),)})
    desk.arrive("r1", "public")
    assert "reject r1 ModelUnavailable" in desk.tell(ReplicaStarted("A", "A#1", "n"), ReplicaFailed("A#1", "no"))
    assert desk.arrive("r2", "public") == ["reject r2 ModelUnavailable"]


def test_nothing_stops_beside_a_start_when_a_node_leaves() -> None:
    nodes = {name: NodeSpec(name, gpus=1) for name in ("n", "m")}
    desk = Desk(model("A", max_replicas=2), nodes=nodes)
    desk.arrive("r1", "A")
    first = desk.ledger.snapshot().replicas[0].node
    other = "m" if first == "n" else "n"
    desk.boot("A", "A#1", first)
    desk.arrive("r2", "A")
    desk.at(10.0)
    desk.tell(ReplicaStarted("A", "A#2", other))
    assert desk.tell(NodesChanged({other: nodes[other]})) == ["quiesce A#1"]
    assert desk.release("r1") == [], "Serve would stop the one that starts"
    assert desk.tell(ReplicaReady("A#2")) == ["grant r2 A#2"], "Serve might stop the one that serves"
    assert desk.gone("A#1") == ["desire A 1"]


def test_one_too_many_after_a_restart_is_the_newest_as_serve_will_have_it() -> None:
    desk = Desk(model("A"), gpus=2, recovering_until=3.0)
    desk.tell(ReplicaStarted("A", "A#2", "n", 20.0), ReplicaStarted("A", "A#1", "n", 10.0), ReplicaReady("A#1"))
    assert desk.at(3.0) == ["desire A 1"]
    assert desk.arrive("r", "A") == ["grant r A#1"]


def test_the_node_where_it_hurts_least() -> None:
    nodes = {name: NodeSpec(name, gpus=1) for name in ("n", "m")}
    desk = Desk(model("X"), model("Y"), model("W"), nodes=nodes)
    desk.warm("X", "X#1", "n")
    desk.now = 100.0
    desk.warm("Y", "Y#1", "m")
    assert desk.arrive("r", "W")[0] == "quiesce X#1"


def test_a_search_ends_where_nobody_could_hurt_less(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[str] = []

    def clear(pool: Pool, node: Node, *more: Any) -> eviction.Plan | None:
        looks.append(node.name)
        return right(pool, node, *more)

    right = eviction.clear
    monkeypatch.setattr(eviction, "clear", clear)
    residents = [model(f"m{index}", num_gpus=0.1) for index in range(10)]
    desk = Desk(*residents, model("guest", num_gpus=0.1), capacity=10)
    resident(desk, *[each.name for each in residents])
    assert desk.arrive("r", "guest") == ["quiesce m0#1", "desire m0 0"]
    assert looks == ["n"], "the least hurtful made room, so no other was tried"
