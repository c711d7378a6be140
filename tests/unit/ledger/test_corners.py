"""Situations that few pools ever see, each of which has its own line in the ledger."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.ledger.events import (
    ConfigChanged,
    LeaseReannounced,
    LoadRequested,
    ReplicaReady,
    ReplicaStarted,
    RequestCancelled,
    UnloadRequested,
)
from cluster.ledger.specs import NodeSpec
from tests.unit.ledger.desk import Desk, model

BOUND = (5.0, 8.0, 12.0)


def contended(**more: object) -> Desk:
    """A drains for B."""
    desk = Desk(model("A", slots=2), model("B"), model("C"), bound_s=BOUND, load_prior_s=0.0, **more)
    desk.arrive("a1", "A", priority=1)
    desk.boot("A", "A#1")
    desk.arrive("b1", "B", priority=1)
    assert desk.at(5.0) == ["quiesce A#1"]
    return desk


def pair(**more: object) -> Desk:
    """Two replicas of A, both idle, beside B."""
    desk = Desk(model("A", slots=1, max_replicas=2, idle_timeout_s=10.0), model("B"), gpus=4, load_prior_s=0.0, **more)
    desk.tell(LoadRequested("A", 2))
    desk.boot("A", "A#1")
    desk.boot("A", "A#2")
    return desk


@pytest.mark.parametrize("used", [1, 2])
def test_replicas_of_two_configurations_when_the_window_closes(used: int) -> None:
    """The older replica has fewer slots and is full; the newer one gets the request."""
    desk = Desk(model("A", slots=1, max_replicas=2), gpus=2, recovering_until=5.0)
    desk.boot("A", "A#1")
    desk.tell(LeaseReannounced("one", "h", "A", "A#1", 1))
    desk.tell(ConfigChanged(replace(desk.spec, models={"A": model("A", slots=3, max_replicas=2)})))
    desk.boot("A", "A#2")
    desk.tell(*(LeaseReannounced(f"old{index}", "h", "A", "A#2", 2 + index) for index in range(used)))
    desk.now = 5.0
    assert desk.arrive("r1", "A") == ["grant r1 A#2", "quiesce A#1", "desire A 2"]


def test_new_replica_is_found_when_the_others_are_in_use() -> None:
    desk = Desk(model("A", slots=3, max_replicas=2), gpus=2)
    desk.tell(LoadRequested("A", 2))
    desk.boot("A", "A#1")
    for request in ("r1", "r2"):
        desk.arrive(request, "A")
    desk.boot("A", "A#2")
    assert desk.arrive("r3", "A") == ["grant r3 A#2"]


def test_position_skips_those_who_left() -> None:
    desk = Desk(model("A"))
    desk.arrive("r0", "A")
    desk.boot("A", "A#1")
    for request in ("r1", "r2", "r3"):
        desk.arrive(request, "A")
    desk.tell(RequestCancelled("r2"))
    assert desk.ledger.queue_position("r3") == ("queued", 2)


def test_deadlines_that_always_come_earlier() -> None:
    """More different timeouts than there are lanes."""
    desk = Desk(model("A"))
    desk.arrive("r", "A")
    desk.boot("A", "A#1")
    for index in range(20):
        desk.arrive(f"r{index}", "A", timeout=100.0 - index)
    desk.at(10.0)
    assert desk.ledger.next_deadline() == 81.0
    desk.tell(RequestCancelled("r19"))
    assert desk.ledger.next_deadline() == 82.0
    assert desk.at(82.0) == ["reject r18 BackendTimeout"]


def test_slot_that_is_handed_over_makes_a_start_needless() -> None:
    desk = Desk(model("A", max_replicas=2), gpus=2)
    desk.arrive("r1", "A")
    desk.boot("A", "A#1")
    assert desk.arrive("r2", "A") == ["desire A 2"]
    assert desk.release("r1") == ["grant r2 A#1", "desire A 1"]


def test_higher_class_in_a_waiting_model_is_looked_at_at_once() -> None:
    desk = Desk(model("A"), model("B"), bound_s=(0.0, 1e3, 1e3), load_prior_s=0.0, min_residency_s=1e6)
    desk.arrive("a1", "A")
    desk.boot("A", "A#1")
    assert desk.arrive("b1", "B", priority=3) == []
    desk.arrive("b2", "B", priority=2)
    assert desk.tell(RequestCancelled("b2")) == []
    assert desk.arrive("b3", "B", priority=1) == ["quiesce A#1"]


def test_replica_that_a_window_did_not_need_is_closed() -> None:
    desk = pair()
    said = []
    for index in range(6):
        said += desk.at(4.0 * index)
        desk.arrive(f"r{index}", "A")
        desk.release(f"r{index}")
    assert said == ["quiesce A#2", "desire A 1"]


def test_capacity_that_does_not_bind() -> None:
    desk = Desk(model("A"), model("B"), capacity=5)
    desk.warm("A", "A#1")
    assert desk.arrive("b1", "B") == ["quiesce A#1", "desire A 0"]


def test_capacity_takes_surplus_replicas_as_busy() -> None:
    desk = pair(capacity=1, bound_s=BOUND)
    desk.arrive("a1", "A")
    desk.arrive("b1", "B", priority=1)
    assert sorted({*desk.out_words(), *desk.at(5.0)}) == ["desire A 1", "quiesce A#1", "quiesce A#2"]


def test_capacity_counts_what_leaves_by_itself() -> None:
    desk = pair(capacity=1)
    for index in range(6):
        desk.at(4.0 * index)
        desk.arrive(f"r{index}", "A")
        desk.release(f"r{index}")
    assert desk.state("A#2") == "STOPPING"
    assert desk.arrive("b1", "B") == ["quiesce A#1", "desire A 0"]
    assert desk.gone("A#1") == []
    assert desk.gone("A#2") == ["desire B 1"]


def test_capacity_over_two_nodes() -> None:
    nodes = {"n": NodeSpec("n", gpus=1), "m": NodeSpec("m", gpus=1)}
    desk = Desk(model("A"), model("B"), nodes=nodes, capacity=1)
    desk.warm("A", "A#1", "m")
    assert desk.arrive("b1", "B") == ["quiesce A#1", "desire A 0"]
    assert desk.gone("A#1") == ["desire B 1"]


def test_victims_for_memory_beside_those_for_devices() -> None:
    nodes = {"n": NodeSpec("n", gpus=2, memory_mib=1000)}
    desk = Desk(model("A", memory_mib=400), model("B", memory_mib=400), model("X", memory_mib=700), nodes=nodes)
    desk.warm("A", "A#1")
    desk.warm("B", "B#1")
    assert sorted(desk.arrive("x1", "X")) == ["desire A 0", "desire B 0", "quiesce A#1", "quiesce B#1"]


def test_victim_that_turns_out_to_be_needless_stays() -> None:
    nodes = {"n": NodeSpec("n", gpus=2, memory_mib=1000)}
    desk = Desk(model("A", memory_mib=100), model("B", memory_mib=800), model("X", memory_mib=700), nodes=nodes)
    desk.warm("A", "A#1")
    desk.at(1.0)
    desk.warm("B", "B#1")
    desk.at(2.0)
    assert desk.arrive("x1", "X") == ["quiesce B#1", "desire B 0"]


def test_one_victim_on_two_devices() -> None:
    desk = Desk(model("A", num_gpus=2.0), model("X", num_gpus=2.0), gpus=2)
    desk.warm("A", "A#1")
    assert desk.arrive("x1", "X") == ["quiesce A#1", "desire A 0"]


def test_what_leaves_anyway_is_counted_on() -> None:
    desk = Desk(model("A", idle_timeout_s=5.0), model("B"))
    desk.warm("A", "A#1")
    assert desk.at(5.0) == ["quiesce A#1", "desire A 0"]
    assert desk.arrive("b1", "B") == []
    assert desk.gone("A#1") == ["desire B 1"]


def test_promise_taken_back_does_not_open_what_is_being_unloaded() -> None:
    desk = contended()
    assert desk.tell(UnloadRequested("A"), RequestCancelled("b1")) == []
    assert desk.state("A#1") == "DRAINING"


def test_promise_that_was_overtaken_is_made_anew() -> None:
    desk = contended()
    # A process that nobody asked for sits in the room that A leaves.
    assert desk.tell(ReplicaStarted("C", "C#1", "n")) == ["desire C 0"]
    desk.release("a1")
    assert desk.gone("A#1") == []
    assert desk.gone("C#1") == ["desire B 1"]
    desk.tell(ReplicaStarted("B", "B#1", "n"))
    assert desk.tell(ReplicaReady("B#1")) == ["grant b1 B#1"]


def test_two_wait_for_one_that_becomes_idle() -> None:
    desk = Desk(model("A"), model("B"), model("C"), bound_s=(1e6,) * 3, load_prior_s=10.0)
    desk.arrive("a1", "A")
    desk.boot("A", "A#1")
    desk.arrive("b1", "B")
    desk.arrive("c1", "C")
    desk.now = 0.1
    assert desk.release("a1") == ["quiesce A#1", "desire A 0"]
    assert desk.gone("A#1") == ["desire B 1"]


@pytest.mark.parametrize("max_asleep", [0, None])
def test_regression_memory_of_a_withdrawn_start(max_asleep: int | None) -> None:
    """What is withdrawn before its process has come is credited at once, so that process must never load anything."""
    nodes = {"n": NodeSpec("n", gpus=2, memory_mib=1000)}
    desk = Desk(model("A", memory_mib=800), model("B", memory_mib=800), nodes=nodes, max_asleep=max_asleep)
    assert desk.arrive("a1", "A") == ["desire A 1"]
    assert desk.tell(RequestCancelled("a1")) == ["desire A 0"]
    assert desk.arrive("b1", "B") == ["desire B 1"]
    desk.tell(ReplicaStarted("A", "A#1", "n"))
    desk.tell(ReplicaStarted("B", "B#1", "n"))
    assert [each.replica for each in desk.loads] == ["B#1"]
    assert desk.boot("B", "B#1") == ["grant b1 B#1"]
    assert desk.at(5.0) == []
    assert [each.replica for each in desk.loads] == ["B#1"]
