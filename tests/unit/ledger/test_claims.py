"""A promise of room is a plan, not a vow: while its victims take their time, a cheaper way replaces it."""

from __future__ import annotations

import pytest

from cluster.ledger.events import NodesChanged, ReplicaReady, ReplicaStarted, RequestCancelled
from cluster.ledger.rules import claims
from cluster.ledger.specs import ModelSpec, NodeSpec
from tests.unit.ledger.desk import Desk, model

BOUND = (5.0, 8.0, 12.0)
NODES = {name: NodeSpec(name, gpus=1) for name in ("n1", "n2")}


def contended(nodes: dict[str, NodeSpec]) -> Desk:
    """A and B stream on a device each; C waits, and A, which came first, drains for it."""
    desk = Desk(model("A"), model("B"), model("C"), nodes=nodes, bound_s=BOUND, load_prior_s=0.0)
    first, second = min(nodes), max(nodes)
    desk.arrive("a1", "A")
    desk.boot("A", "A#1", first)
    desk.arrive("b1", "B")
    desk.boot("B", "B#1", second)
    desk.now = 10.0
    assert desk.arrive("c1", "C") == ["quiesce A#1"]
    return desk


@pytest.mark.parametrize("nodes", [{"n": NodeSpec("n", gpus=2)}, NODES], ids=["one node", "two"])
def test_a_model_that_becomes_idle_replaces_a_busy_victim(nodes: dict[str, NodeSpec]) -> None:
    desk = contended(nodes)
    desk.now = 61.0
    assert desk.release("b1") == ["reopen A#1", "quiesce B#1", "desire B 0"]
    assert desk.arrive("a2", "A") == [], "A serves on"
    assert desk.gone("B#1") == ["desire C 1"]


def test_a_stop_that_hangs_is_not_waited_for_while_another_idles() -> None:
    desk = contended(NODES)
    desk.now = 19.0
    desk.release("a1")
    assert desk.state("A#1") == "STOPPING"
    desk.now = 20.0
    assert desk.release("b1") == [], "A is about to be gone"
    due = desk.ledger.next_deadline()
    assert due is not None
    assert due <= 30.0
    assert desk.at(due) == [] or desk.state("B#1") == "STOPPING"
    while desk.state("B#1") != "STOPPING":
        due = desk.ledger.next_deadline()
        assert due is not None
        assert due < 40.0, "C waits for a stop that hangs"
        desk.at(due)
    assert desk.gone("B#1") == ["desire C 1"]


def test_a_short_stream_is_waited_for_rather_than_a_long_one() -> None:
    """B never idles, but its streams are short; A's goes on and on."""
    desk = contended({"n": NodeSpec("n", gpus=2)})
    number = 1
    while desk.state("B#1") == "READY":
        assert desk.now < 60.0, "C waits for the long stream"
        desk.at(desk.now + 0.5)
        if desk.state("B#1") == "READY":
            number += 1
            desk.arrive(f"b{number}", "B")
            desk.release(f"b{number - 1}")
    assert desk.state("A#1") == "READY"
    assert desk.release(f"b{number}") == ["desire B 0"]


def test_of_two_long_streams_the_older_choice_stays() -> None:
    desk = contended({"n": NodeSpec("n", gpus=2)})
    for now in (19.0, 21.0, 30.0, 100.0, 400.0):
        assert desk.at(now) == []
    assert desk.release("a1") == ["desire A 0"]


def test_nothing_is_looked_for_where_all_that_could_leave_does() -> None:
    desk = Desk(model("A"), model("B"), bound_s=BOUND, load_prior_s=0.0)
    desk.arrive("a1", "A")
    desk.boot("A", "A#1")
    desk.arrive("b1", "B", timeout=300.0)
    assert desk.at(8.0) == ["quiesce A#1"]
    assert desk.ledger.next_deadline() == 300.0


def test_who_waits_longest_is_offered_what_becomes_idle() -> None:
    """C has a promise that takes its time, D nothing yet: C came first."""
    desk = Desk(*(model(name) for name in "ABCD"), gpus=2, bound_s=BOUND, load_prior_s=0.0, min_residency_s=1e9)
    desk.arrive("a1", "A")
    desk.boot("A", "A#1")
    desk.arrive("b1", "B")
    desk.boot("B", "B#1")
    desk.now = 10.0
    desk.arrive("c1", "C")
    desk.now = 12.0
    desk.arrive("d1", "D")
    assert desk.at(18.0) == ["quiesce A#1"]
    assert desk.release("b1") == ["reopen A#1", "quiesce B#1", "desire B 0"]
    assert desk.tell(RequestCancelled("c1")) == []
    assert desk.gone("B#1") == ["desire D 1"]


def test_a_promise_for_several_places_keeps_what_is_about_to_be_gone() -> None:
    """W takes two of three devices: A's is nearly free, B streams on, and then D idles."""
    desk = Desk(model("W", num_gpus=2.0), *(model(name) for name in "ABD"), gpus=3, bound_s=BOUND, load_prior_s=0.0)
    for name in "ABD":
        desk.arrive(f"{name}1", name)
        desk.boot(name, f"{name}#1")
    desk.now = 10.0
    assert desk.arrive("w1", "W") == ["quiesce B#1", "quiesce A#1"]
    desk.now = 20.0
    assert desk.release("A1") == ["desire A 0"]
    assert desk.release("D1") == ["reopen B#1", "quiesce D#1", "desire D 0"]
    desk.gone("A#1")
    assert desk.gone("D#1") == ["desire W 1"]


def test_a_lost_nodes_victim_is_not_taken_back() -> None:
    desk = contended(NODES)
    assert desk.tell(NodesChanged({"n2": NODES["n2"]})) == []
    assert desk.release("b1") == ["quiesce B#1", "desire B 0"]
    assert desk.state("A#1") == "DRAINING"


def test_looks_come_less_and_less_often() -> None:
    desk = contended({"n": NodeSpec("n", gpus=2)})
    claim = desk.ledger._pool.models["C"].claim
    assert claim is not None
    assert [claims.next_look(claim, 10.0 + age) - 10.0 for age in (0.0, 1.0, 2.0, 5.0)] == [1.0, 2.0, 4.0, 10.0]


def test_a_stop_that_hangs_is_given_up_for_a_busy_model_in_the_end() -> None:
    desk = contended(NODES)
    desk.now = 11.0
    assert desk.release("a1") == ["desire A 0"]
    said: list[str] = []
    while not said:
        due = desk.ledger.next_deadline()
        assert due is not None
        assert due < 30.0
        said = desk.at(due)
    assert said == ["quiesce B#1"]
    assert desk.now >= 11.0 + claims.STOP_PATIENCE_S


def test_room_that_another_promise_leaves_over_needs_no_promise() -> None:
    """A's whole device was promised to D, which takes half of it; E waits for the other half."""
    desk = Desk(model("A"), model("D", num_gpus=0.5), model("E", num_gpus=0.5), bound_s=BOUND, load_prior_s=0.0)
    desk.arrive("a1", "A")
    desk.boot("A", "A#1")
    desk.now = 10.0
    assert desk.arrive("d1", "D") == ["quiesce A#1"]
    assert desk.arrive("e1", "E") == []
    desk.release("a1")
    assert desk.gone("A#1") == ["desire D 1", "desire E 1"]


def test_a_higher_class_takes_over_what_was_promised_to_a_lower_one() -> None:
    """A drains for the low l1 already when the high h1 comes: the room is h1's, and l1's turn comes after it."""
    desk = Desk(model("A"), model("H"), model("L"), bound_s=BOUND, load_prior_s=0.0)
    desk.arrive("a1", "A")
    desk.boot("A", "A#1")
    desk.now = 5.0
    assert desk.arrive("l1", "L", priority=3) == ["quiesce A#1"]
    desk.now = 6.0
    assert desk.arrive("h1", "H", priority=1) == []
    desk.now = 28.0
    assert desk.release("a1") == ["desire A 0"]
    assert desk.gone("A#1") == ["desire H 1"]
    assert desk.boot("H", "H#1") == ["grant h1 H#1"]


def test_a_higher_class_that_leaves_gives_the_promise_back() -> None:
    desk = Desk(model("A"), model("H"), model("L"), bound_s=BOUND, load_prior_s=0.0)
    desk.arrive("a1", "A")
    desk.boot("A", "A#1")
    desk.now = 5.0
    desk.arrive("l1", "L", priority=3)
    desk.arrive("h1", "H", priority=1)
    assert desk.tell(RequestCancelled("h1")) == ["reopen A#1"]
    assert desk.at(6.3) == ["quiesce A#1"]
    desk.release("a1")
    assert desk.gone("A#1") == ["desire L 1"]


def test_what_is_free_already_goes_to_the_better_waiter_too() -> None:
    """W waits for two devices and has one; h1 needs but that, and W's other victim serves on."""
    desk = Desk(model("A"), model("B"), model("H"), model("W", num_gpus=2.0), gpus=2, bound_s=BOUND, load_prior_s=0.0)
    for name in "AB":
        desk.arrive(f"{name}1", name)
        desk.boot(name, f"{name}#1")
    desk.now = 5.0
    assert desk.arrive("w1", "W", priority=3) == ["quiesce B#1", "quiesce A#1"]
    desk.release("A1")
    assert desk.gone("A#1") == []
    assert desk.arrive("h1", "H", priority=1) == ["reopen B#1", "desire H 1"]
    assert desk.boot("H", "H#1") == ["grant h1 H#1"]
    assert desk.at(13.0) == ["quiesce H#1", "quiesce B#1"]


@pytest.mark.parametrize(
    ("other", "rival"),
    [
        # Of the rival's two devices L was promised but one: that helps nobody, so L keeps it.
        (model("P", pinned=True), model("H", num_gpus=2.0)),
        # The rival is served already, and wants a second replica; L has none.
        (model("G", slots=1, max_replicas=2), model("G", slots=1, max_replicas=2)),
    ],
    ids=["of another place", "by growth"],
)
def test_a_promise_is_left_alone(other: ModelSpec, rival: ModelSpec) -> None:
    """Its waiters are of a higher class than L's, and come later."""
    desk = Desk(model("A"), other, model("L"), rival, gpus=2, load_prior_s=0.0)
    for name in ("A", other.name):
        desk.arrive(f"{name}1", name)
        desk.boot(name, f"{name}#1")
    desk.now = 5.0
    assert desk.arrive("l1", "L", priority=3) == ["quiesce A#1"]
    assert desk.arrive("r2", rival.name, priority=1) == []
    desk.release("A1")
    assert desk.gone("A#1") == ["desire L 1"]


def test_a_models_older_replica_does_not_replace_its_newer_one() -> None:
    """A#2 drains for C when A#1 becomes idle; taken back, A#2 would be the one that Serve stops."""
    desk = Desk(model("A", slots=1, max_replicas=2), model("C"), gpus=2, bound_s=BOUND, load_prior_s=0.0)
    desk.arrive("a0", "A")
    desk.boot("A", "A#1")
    desk.now = 2.0
    desk.release("a0")
    desk.arrive("a1", "A")
    desk.arrive("a2", "A")
    desk.boot("A", "A#2")
    desk.now = 10.0
    desk.arrive("c1", "C")
    assert desk.at(18.0) == ["quiesce A#2"]
    assert desk.release("a1") == []
    assert desk.at(100.0) == []
    assert desk.release("a2") == ["desire A 1"]


def busy_with(waiter: int) -> Desk:
    """C serves a medium request on the only device, and somebody of that class waits for it."""
    desk = Desk(model("A"), model("B"), model("C", slots=1), gpus=1, bound_s=(900.0, 900.0, 900.0))
    desk.arrive("c1", "C")
    desk.tell(ReplicaStarted("C", "C", "n"))
    desk.at(2.0)
    desk.tell(ReplicaReady("C"))
    desk.at(20.0)
    desk.arrive("c2", "C", waiter)
    return desk


def test_what_may_go_is_the_first_ones_in_line_whoever_notices() -> None:
    """C's waiter of the highest class leaves: b may have its place from then on, and would have looked in a moment."""
    desk = busy_with(waiter=1)
    assert desk.arrive("b", "B", 1) == []
    desk.now = 20.1
    assert desk.tell(RequestCancelled("c2")) == []
    assert desk.arrive("a", "A", 1) == ["quiesce C"]
    assert desk.release("c1") == ["desire C 0"]
    assert desk.gone("C") == ["desire B 1"]


def test_who_may_not_have_it_is_no_hindrance_to_those_behind_him() -> None:
    desk = busy_with(waiter=2)
    assert desk.arrive("b", "B", 2) == []
    desk.now = 55.0
    assert desk.arrive("a", "A", 1) == ["quiesce C"]
    assert desk.tell(RequestCancelled("c2")) == []
    assert desk.release("c1") == ["desire C 0"]
    assert desk.gone("C") == ["desire A 1"]
