"""The minimum turn: a model that got its place keeps it for a while, however many others are overdue."""

from __future__ import annotations

from cluster.ledger.events import ReplicaReady, ReplicaStarted, RequestCancelled
from cluster.ledger.transitions import SwapBegun
from tests.unit.ledger.desk import Desk, model

BOUND = (5.0, 8.0, 12.0)
LOAD_S = 4.0


def overdue(bound_s: tuple[float | None, ...] = BOUND) -> Desk:
    """A was loaded in 4 s, at 4; B's waiter, who came at 1, is overdue at once. A turn is 12 s."""
    desk = Desk(model("A", slots=1), model("B"), bound_s=bound_s)
    desk.arrive("a1", "A", priority=1)
    desk.tell(ReplicaStarted("A", "A#1", "n"))
    desk.at(1.0)
    desk.arrive("b1", "B", priority=1)
    desk.at(LOAD_S)
    desk.tell(ReplicaReady("A#1"))
    desk.arrive("a2", "A")
    return desk


def test_an_overdue_model_waits_for_the_end_of_the_turn() -> None:
    desk = overdue()
    assert desk.at(15.9) == []
    assert desk.at(16.2) == ["quiesce A#1"]


def test_a_promise_need_not_wait_for_a_turn_when_nobody_waits_for_the_victim() -> None:
    """A bound that was not configured fits the swap, as the turn does, and is none."""
    desk = overdue()
    assert desk.tell(RequestCancelled("a2")) == []
    assert desk.at(4.5) == ["quiesce A#1"]
    desk = overdue((None, None, None))
    assert desk.tell(RequestCancelled("a2")) == []
    assert desk.at(15.9) == []
    assert desk.at(16.2) == ["quiesce A#1"]


def test_a_turn_ends_with_the_work() -> None:
    desk = overdue()
    desk.at(5.0)
    assert desk.release("a1") == ["grant a2 A#1"]
    assert desk.release("a2") == ["quiesce A#1", "desire A 0"]


def test_a_turn_does_not_begin_anew_when_a_drain_is_taken_back() -> None:
    desk = overdue()
    desk.at(16.2)
    assert desk.tell(RequestCancelled("b1")) == ["reopen A#1"]
    assert desk.arrive("b2", "B", priority=1) == ["quiesce A#1"], "due at once, since so was b1"


def test_a_replica_that_its_model_can_spare_has_no_turn() -> None:
    desk = Desk(model("A", slots=1, max_replicas=2), model("B"), gpus=2, bound_s=BOUND)
    for number in (1, 2):
        desk.arrive(f"a{number}", "A")
        desk.tell(ReplicaStarted("A", f"A#{number}", "n"))
        desk.now += LOAD_S
        desk.tell(ReplicaReady(f"A#{number}"))
    desk.release("a1")
    assert desk.arrive("b1", "B") == ["quiesce A#2"]


def resident(priority: int) -> Desk:
    """A was loaded in 4 s, at 4, and streams one request of this class without an end. There are no bounds."""
    desk = Desk(model("A", slots=2), model("B"), bound_s=(1e6,) * 3, min_residency_s=1e9)
    desk.arrive("a1", "A", priority=priority)
    desk.tell(ReplicaStarted("A", "A#1", "n"))
    desk.now = LOAD_S
    desk.tell(ReplicaReady("A#1"))
    return desk


def test_a_strictly_higher_class_preempts_after_the_turn() -> None:
    desk = resident(2)
    desk.now = 10.0
    assert desk.arrive("b1", "B", priority=1) == []
    assert desk.at(15.9) == []
    assert desk.at(16.2) == ["quiesce A#1"]
    (swap,) = [each for each in desk.ledger.transitions if isinstance(each, SwapBegun)]
    assert swap.reason == "class"


def test_nobody_preempts_his_own_class_or_who_waits_for_the_victim() -> None:
    desk = resident(2)
    desk.now = 20.0
    assert desk.arrive("b1", "B", priority=2) == []
    assert desk.at(40.0) == []
    assert desk.arrive("a2", "A", priority=1, slots=2) == []
    assert desk.arrive("b2", "B", priority=1) == [], "a high one waits for A, too"


def gated(
    *,
    a3_at: float = 36.0,
    a3: int = 2,
    b1: int = 2,
    timeout: float = 600.0,
    bound_s: tuple[float | None, ...] = (None, None, None),
) -> Desk:
    """A, loaded in 4 s at 4, streams a2; b1 of B came at 6 and is due at 37; for A a3 waits, since before that."""
    desk = Desk(model("A", slots=1), model("B"), bound_s=bound_s)
    desk.arrive("a1", "A")
    desk.tell(ReplicaStarted("A", "A#1", "n"))
    desk.at(LOAD_S)
    desk.tell(ReplicaReady("A#1"))
    desk.at(5.0)
    desk.release("a1")
    desk.arrive("a2", "A")
    desk.at(6.0)
    desk.arrive("b1", "B", priority=b1, timeout=timeout)
    assert desk.at(a3_at) == []
    desk.arrive("a3", "A", priority=a3)
    return desk


def test_who_waited_when_the_others_became_due_is_served_first() -> None:
    desk = gated()
    desk.at(38.0)
    desk.arrive("a4", "A")
    assert desk.at(38.9) == []
    assert desk.release("a2") == ["grant a3 A#1"]
    assert desk.at(39.2) == ["quiesce A#1"], "a4 came too late"


def test_who_comes_after_that_waits_for_the_next_turn() -> None:
    desk = gated(a3_at=36.95)
    assert desk.at(37.3) == []
    desk = gated(a3_at=36.0)
    desk.tell(RequestCancelled("a3"))
    assert desk.at(37.1) == ["quiesce A#1"]


def test_a_promise_that_is_due_as_well_is_kept_first() -> None:
    desk = gated(a3_at=7.0, bound_s=(20.0, 20.0, 40.0), b1=3)
    assert desk.at(38.9) == []
    assert desk.release("a2") == ["grant a3 A#1"]
    assert desk.at(39.2) == ["quiesce A#1"]


def test_a_deadline_a_promise_and_a_higher_class_wait_for_nobody() -> None:
    for desk in (gated(timeout=40.0), gated(bound_s=(40.0,) * 3), gated(a3=3)):
        assert desk.at(36.9) == []
        assert desk.at(37.1) == ["quiesce A#1"]
