"""What a newcomer is told of his wait, in the situations that he may find; `tests/sim` holds it against the truth."""

from __future__ import annotations

import pytest

from cluster.ledger.events import ReplicaStarted
from cluster.ledger.specs import ServerSpec
from tests.unit.ledger.desk import Desk, model
from tests.unit.ledger.server_desk import ONE
from tests.unit.ledger.server_desk import Desk as ServerDesk

SERVICE_S = 4.0
STOP_S = 1.0


def wait(desk: Desk, name: str, priority: int = 2) -> float:
    told = desk.ledger.expected_wait_s(name, priority, desk.now)
    assert told is not None
    return round(told, 2)


def taught(**more: object) -> Desk:
    """A and B were loaded in 5 s, as is assumed at first; A has learned that its streams last 4 s, and is idle."""
    desk = Desk(model("A", slots=2), model("B", slots=2), model("C"), **more)
    desk.arrive("a0", "A")
    desk.tell(ReplicaStarted("A", "A#1", "n"))
    desk.now = 5.0
    desk.boot("A", "A#1")
    desk.now += SERVICE_S
    desk.release("a0")
    desk.ledger._pool.stop_s = STOP_S
    return desk


def test_a_free_slot_is_had_at_once_and_then_there_is_a_line() -> None:
    desk = taught()
    told = []
    for index in range(6):
        told.append(wait(desk, "A"))
        desk.arrive(f"a{index + 1}", "A")
    assert told == [0.0, 0.0, 2.0, 4.0, 6.0, 8.0]
    assert wait(desk, "A", priority=1) == 2.0
    assert desk.ledger.expected_wait_s("nobody", 2, 9.0) is None


def test_a_cold_model_needs_its_load_or_what_is_left_of_it() -> None:
    desk = Desk(model("A"))
    assert wait(desk, "A") == 5.0
    desk.arrive("a1", "A")
    desk.tell(ReplicaStarted("A", "A#1", "n"))
    desk.now = 3.0
    assert wait(desk, "A") == 2.0


def test_an_idle_model_makes_room_at_once() -> None:
    desk = taught()
    assert wait(desk, "B") == STOP_S + 5.0
    desk.arrive("b1", "B")
    assert wait(desk, "B") == STOP_S + 5.0, "A stops"


def test_a_busy_model_makes_room_when_it_pauses_or_the_bound_comes() -> None:
    """A's stream is taken to last for 4 s, and B's bound is far."""
    desk = taught(bound_s=(1e3, 1e3, 1e3), min_residency_s=1e9)
    desk.now = 100.0
    desk.arrive("a1", "A")
    pause_s = wait(desk, "B") - STOP_S - 5.0
    assert 4.0 <= pause_s <= 6.0
    desk.arrive("b1", "B")
    assert wait(desk, "B") - STOP_S - 5.0 == pytest.approx(pause_s, abs=0.5)


def test_a_promise_is_kept_when_the_drain_has_ended() -> None:
    desk = taught(bound_s=(1e3, 1e3, 1e3))
    desk.now = 100.0
    desk.arrive("a1", "A", priority=3)
    assert desk.arrive("b1", "B", priority=2) == ["quiesce A#1"]
    drained = wait(desk, "B")
    assert drained > 5.0
    desk.now = 101.0
    assert wait(desk, "B") == drained - 1.0
    assert wait(desk, "A") > wait(desk, "B") + 5.0, "A comes back after B"
    assert wait(desk, "C") > wait(desk, "B"), "so does C"


def test_who_stands_before_in_line_has_a_place_first() -> None:
    """B waits for A's place, C comes next; a high one would come before B."""
    desk = taught(bound_s=(1e3, 1e3, 1e3), min_residency_s=1e9)
    desk.now = 100.0
    desk.arrive("a1", "A", priority=1)
    desk.arrive("b1", "B")
    desk.now = 101.0
    assert wait(desk, "C") >= wait(desk, "C", priority=1) + 5.0


def test_another_models_load_and_its_work_come_first() -> None:
    desk = Desk(model("A"), model("B"))
    desk.arrive("a1", "A")
    desk.tell(ReplicaStarted("A", "A#1", "n"))
    desk.now = 2.0
    assert wait(desk, "B") >= 3.0 + 5.0


def test_a_long_line_is_cut_where_others_wait() -> None:
    """A's turn lasts 3 swaps; then B has its own, again and again."""
    desk = taught(bound_s=(1e3, 1e3, 1e3), min_residency_s=1e9)
    for index in range(40):
        desk.arrive(f"a{index + 1}", "A")
    alone = wait(desk, "A")
    desk.arrive("b1", "B")
    assert wait(desk, "A") > alone + 5.0


def test_where_nobody_can_leave_the_bound_is_all_that_is_known() -> None:
    desk = Desk(model("A", pinned=True), model("B"), bound_s=(30.0, 60.0, None))
    desk.warm("A", "A#1")
    assert [wait(desk, "B", priority) for priority in (1, 2)] == [35.0, 65.0]


def test_the_line_before_a_server() -> None:
    desk = ServerDesk(ServerSpec(ONE, 2), manifests={ONE: "a"})
    for name in ("r1", "r2"):
        desk.ask(name, "a")
    desk.done("r1", after=4.0)
    desk.done("r2", after=0.0)
    for name in ("r3", "r4", "r5"):
        desk.ask(name, "a")
    told = desk.ledger.expected_wait_s("a", 2, desk.now)
    assert told == 4.0


def test_the_pool_says_that_it_is_overloaded() -> None:
    desk = Desk(model("A"), model("B"), bound_s=(5.0, 8.0, 12.0), turn_swaps=100.0)
    desk.arrive("a1", "A")
    desk.tell(ReplicaStarted("A", "A#1", "n"))
    desk.now = 1.0
    desk.boot("A", "A#1")
    desk.arrive("b1", "B")
    desk.at(9.0)
    assert not desk.ledger.snapshot().overloaded
    desk.at(9.1)
    assert desk.ledger.snapshot().overloaded
