"""Arrivals, lines, leases, and how they end."""

from __future__ import annotations

import pytest

from cluster.ledger.events import (
    Grant,
    HolderDied,
    LeaseReleased,
    LoadRequested,
    ReplicaFailed,
    ReplicaReady,
    ReplicaStarted,
    RequestArrived,
    RequestCancelled,
    Ticked,
    UnloadRequested,
)
from cluster.ledger.specs import ModelSpec
from tests.unit.ledger.desk import Desk, model


def loaded(slots: int = 1, **more: object) -> Desk:
    desk = Desk(model("A", slots=slots), **more)
    desk.warm("A", "A#1")
    return desk


def test_first_request_loads_and_is_granted_when_ready() -> None:
    desk = Desk(model("A", slots=2))
    assert desk.arrive("r1", "A") == ["desire A 1"]
    assert desk.tell(ReplicaStarted("A", "A#1", "n")) == []
    assert desk.ledger.queue_position("r1") == ("loading", "A")
    desk.now = 3.0
    assert desk.tell(ReplicaReady("A#1")) == ["grant r1 A#1"]
    assert desk.grants["r1"] == Grant("r1", "h", "A", "A#1", (0,), 1, 0.0, 3.0, devices=(0,))
    assert desk.ledger.queue_position("r1") is None
    assert desk.arrive("r2", "A") == ["grant r2 A#1"]


def test_single_flight_one_load_for_many_waiters() -> None:
    desk = Desk(model("A", slots=8), gpus=4)
    assert [desk.arrive(f"r{index}", "A") for index in range(8)] == [["desire A 1"], *[[]] * 7]
    assert len(desk.boot("A", "A#1")) == 8


def test_repeated_arrival_is_recognised() -> None:
    desk = loaded()
    assert desk.arrive("r1", "A") == ["grant r1 A#1"]
    first = desk.grants["r1"]
    assert desk.arrive("r1", "A") == ["grant r1 A#1"]
    assert desk.grants["r1"] == first
    desk.arrive("r2", "A")
    assert desk.arrive("r2", "A") == []
    assert desk.release("r1") == ["grant r2 A#1"]


@pytest.mark.parametrize("shift", [-1, 1, 100])
def test_stale_release_changes_nothing(shift: int) -> None:
    desk = loaded()
    desk.arrive("r1", "A")
    desk.arrive("r2", "A")
    before = desk.ledger.snapshot()
    assert desk.tell(LeaseReleased("r1", desk.grants["r1"].generation + shift)) == []
    assert desk.ledger.snapshot() == before


def test_duplicate_and_unknown_releases_change_nothing() -> None:
    desk = loaded(slots=2)
    desk.arrive("r1", "A")
    desk.arrive("r2", "A")
    desk.release("r1")
    before = desk.ledger.snapshot()
    assert desk.release("r1", "r1") == []
    assert desk.tell(LeaseReleased("nobody", 1)) == []
    assert desk.ledger.snapshot() == before


def test_classes_go_before_each_other_and_fifo_within() -> None:
    desk = loaded()
    desk.arrive("first", "A")
    for request, priority in (("low", 3), ("medium", 2), ("high1", 1), ("high2", 1)):
        desk.arrive(request, "A", priority=priority)
    assert desk.ledger.queue_position("low") == ("queued", 4)
    assert desk.ledger.queue_position("high2") == ("queued", 2)
    order = ["first"]
    while said := desk.release(order[-1]):
        order.append(said[0].split()[1])
    assert order == ["first", "high1", "high2", "medium", "low"]


def test_ageing_lets_the_long_waiting_overtake() -> None:
    desk = loaded()
    desk.arrive("first", "A")
    desk.arrive("low", "A", priority=3)
    desk.at(61.0)
    desk.arrive("high", "A", priority=1)
    assert desk.release("first") == ["grant low A#1"]
    desk.arrive("medium", "A", priority=2)
    assert desk.release("low") == ["grant high A#1"]


def test_low_alone_and_medium_before_low() -> None:
    desk = loaded()
    desk.arrive("first", "A")
    desk.arrive("low", "A", priority=3)
    assert desk.release("first") == ["grant low A#1"]
    desk.arrive("low2", "A", priority=3)
    desk.arrive("medium", "A", priority=2)
    assert desk.release("low") == ["grant medium A#1"]


def test_blocked_model_blocks_nobody_else() -> None:
    desk = Desk(model("A"), model("B", pinned=True), gpus=1)
    desk.warm("B", "B#1")
    desk.arrive("a1", "A", priority=1)
    assert desk.arrive("b1", "B", priority=3) == ["grant b1 B#1"]


def test_deadlines_of_all_kinds() -> None:
    desk = Desk(model("A", load_timeout_s=50.0))
    assert desk.tell(RequestArrived("r0", "h", "A", 2, 0.0)) == ["reject r0 BackendTimeout"]
    desk.arrive("r1", "A", timeout=5.0)
    desk.arrive("r2", "A", timeout=3.0)
    assert desk.ledger.next_deadline() == 3.0
    assert desk.at(3.0) == ["reject r2 BackendTimeout"]
    assert desk.extras() == {"phase": "loading"}
    # A late tick loses nothing: whatever event comes next does what is due.
    desk.now = 6.0
    assert desk.tell(RequestCancelled("nobody")) == ["reject r1 BackendTimeout", "desire A 0"]


def test_a_clock_that_goes_back_stands_still() -> None:
    desk = loaded()
    desk.at(100.0)
    desk.now = 50.0
    desk.arrive("r1", "A")
    desk.arrive("r2", "A", timeout=60.0)
    desk.now = 100.0
    assert desk.release("r1") == ["grant r2 A#1"]
    assert desk.grants["r2"].queue_wait_s == 0.0


def test_queue_bounds() -> None:
    desk = Desk(model("A", max_queued=2), model("B"), queue_max_size=3)
    desk.arrive("a1", "A")
    desk.arrive("a2", "A")
    assert desk.arrive("a3", "A") == ["reject a3 QueueFull"]
    told = {"queue_position": 3, "expected_wait_s": 5.0, "overloaded": False}
    assert desk.extras() == {"retry_after": 5.0, **told}, "a load that is taken to last 5 s"
    desk.arrive("b1", "B")
    assert desk.arrive("b2", "B") == ["reject b2 QueueFull"]


def test_the_patient_stand_in_a_full_line_and_keep_their_place() -> None:
    desk = Desk(model("A", max_queued=1), model("B"), queue_max_size=2)

    def arrive(request: str, name: str) -> list[str]:
        return desk.tell(RequestArrived(request, "h", name, 2, desk.now + 9e5, is_patient=True))

    desk.arrive("first", "A")
    assert arrive("second", "A") == [], "the model's line is full"
    assert arrive("third", "A") == [], "all lines are full"
    assert desk.arrive("hasty", "A") == ["reject hasty QueueFull"]
    assert arrive("other", "B") == []
    assert desk.boot("A", "A#1") == ["grant first A#1"]
    # Who comes when a slot is about to be free stands behind them.
    desk.arrive("late", "A")
    assert desk.release("first") == ["grant second A#1"]
    assert desk.release("second") == ["grant third A#1"]


def test_cancelled_in_the_queue_loads_nothing() -> None:
    desk = Desk(model("A"))
    desk.arrive("r1", "A")
    assert desk.tell(RequestCancelled("r1")) == ["desire A 0"]
    assert desk.arrive("r1", "A") == ["reject r1 BackendUnavailable"]


def test_a_start_with_a_process_is_kept() -> None:
    desk = Desk(model("A"))
    desk.arrive("r1", "A")
    desk.tell(ReplicaStarted("A", "A#1", "n"))
    assert desk.tell(RequestCancelled("r1")) == []
    desk.tell(ReplicaReady("A#1"))
    assert desk.arrive("r2", "A") == ["grant r2 A#1"]


def test_cancelled_with_a_lease() -> None:
    desk = loaded()
    desk.arrive("r1", "A")
    desk.arrive("r2", "A")
    assert desk.tell(RequestCancelled("r1")) == ["grant r2 A#1"]


def test_cancellation_is_forgotten_in_time() -> None:
    desk = Desk(model("A", idle_timeout_s=0.0))
    desk.warm("A", "A#1")
    desk.tell(RequestCancelled("r1"))
    assert desk.arrive("r1", "A") == ["reject r1 BackendUnavailable"]
    desk.at(30.0)
    desk.at(90.0)
    desk.tell(RequestCancelled("r2"))
    desk.at(400.0)
    assert desk.arrive("r1", "A") == ["grant r1 A#1"]


def test_memory_of_ids_is_bounded() -> None:
    desk = loaded()
    desk.tell(*(RequestCancelled(f"r{index}") for index in range(20_000)))
    memory = desk.ledger._pool.cancelled
    assert len(memory.young) + len(memory.old) <= 2 * memory.limit
    assert "r19999" in memory
    assert "r0" not in memory


def test_dead_holder_gives_everything_back() -> None:
    desk = loaded(slots=2)
    desk.arrive("r1", "A", holder="dead")
    desk.arrive("r2", "A", holder="h")
    desk.arrive("r3", "A", holder="dead")
    desk.arrive("r4", "A", holder="h")
    assert desk.tell(HolderDied("dead")) == ["grant r4 A#1"]
    assert desk.arrive("r5", "A", holder="dead") == ["reject r5 BackendUnavailable"]


def test_unknown_model() -> None:
    desk = Desk(model("A"), variants={"public": (("A", 1.0),)})
    assert desk.arrive("r1", "nobody") == ["reject r1 ModelNotFound"]
    assert desk.extras() == {"available_models": ["A", "public"]}


def test_variants_come_by_weight() -> None:
    desk = Desk(
        model("A", slots=9), model("B", slots=9), gpus=2, variants={"public": (("A", 3.0), ("B", 1.0), ("gone", 5.0))}
    )
    desk.warm("A", "A#1")
    desk.warm("B", "B#1")
    got = [desk.arrive(f"r{index}", "public")[0][-3] for index in range(8)]
    assert got == ["A", "A", "B", "A"] * 2


def test_offload_threshold() -> None:
    small = ModelSpec("small", slots=4)
    desk = Desk(model("A", cpu_offload_model="small"), small, offload_queue_threshold=2)
    desk.arrive("r1", "A")
    desk.arrive("r2", "A")
    assert desk.arrive("r3", "A") == ["desire small 1"]
    assert desk.boot("small", "small#1") == ["grant r3 small#1"]
    assert desk.arrive("r4", "A") == ["grant r4 small#1"]


def test_offload_without_a_model_is_refused() -> None:
    desk = Desk(model("A"), offload_queue_threshold=1)
    desk.arrive("r1", "A")
    assert desk.arrive("r2", "A") == ["reject r2 QueueFull"]
    assert desk.tell(RequestArrived("r3", "h", "A", 2, 9e5, is_patient=True)) == []
    assert desk.boot("A", "A#1") == ["grant r1 A#1"]
    assert desk.release("r1") == ["grant r3 A#1"]


def test_fallbacks_in_order_each_once() -> None:
    desk = Desk(
        model("A", fallbacks=("nobody", "A", "M", "B")),
        model("M", manual=True),
        model("B", fallbacks=("C",)),
        model("C"),
        gpus=2,
        backoff_s=(5.0, 60.0),
    )
    desk.arrive("a1", "A")
    desk.tell(ReplicaStarted("A", "A#1", "n"))
    assert desk.tell(ReplicaFailed("A#1", "broken")) == ["desire A 0", "desire B 1"]
    # New ones go there at once, as long as A pauses.
    assert desk.arrive("a2", "A") == []
    assert len(desk.boot("B", "B#1")) == 1
    assert desk.release("a1") == ["grant a2 B#1"]
    desk.release("a2")
    assert desk.arrive("a3", "A") == ["grant a3 B#1"]


def test_fallbacks_exhausted_is_the_first_error_of_the_last() -> None:
    desk = Desk(model("A", fallbacks=("M",), manual=True), model("M", manual=True))
    assert desk.arrive("a1", "A") == ["reject a1 ModelNotLoaded"]


def test_fallback_model_that_is_unavailable_too() -> None:
    desk = Desk(model("A", fallbacks=("M", "B")), model("M", manual=True), model("B", manual=True), gpus=2)
    desk.arrive("a1", "A")
    desk.tell(ReplicaStarted("A", "A#1", "n"))
    assert desk.tell(ReplicaFailed("A#1", "broken")) == ["reject a1 ModelUnavailable", "desire A 0"]


def test_keep_alive() -> None:
    desk = Desk(model("A", idle_timeout_s=100.0), model("B"), gpus=2)
    desk.arrive("r1", "A", keep_alive=3.0)
    desk.boot("A", "A#1")
    desk.release("r1")
    assert desk.ledger.next_deadline() == 3.0
    assert desk.at(3.0) == ["quiesce A#1", "desire A 0"]
    desk.gone("A#1")
    desk.arrive("r2", "A", keep_alive=-1)
    desk.boot("A", "A#2")
    desk.release("r2")
    assert desk.ledger.snapshot().models["A"].pinned is True
    assert desk.at(1e6) == []
    desk.arrive("r3", "A", keep_alive=0.0)
    assert desk.release("r3") == ["quiesce A#2", "desire A 0"]


def test_keep_alive_goes_with_the_slot_to_the_next() -> None:
    desk = Desk(model("A", idle_timeout_s=100.0))
    desk.arrive("r1", "A")
    desk.boot("A", "A#1")
    desk.arrive("r2", "A", priority=1, keep_alive=2.0)
    desk.release("r1")
    desk.release("r2")
    assert desk.at(2.0) == ["quiesce A#1", "desire A 0"]


def test_idle_timeout_of_zero_is_never() -> None:
    desk = Desk(model("A", idle_timeout_s=0.0))
    desk.warm("A", "A#1")
    assert desk.ledger.next_deadline() is None
    assert desk.at(1e9) == []


def test_manual_model() -> None:
    desk = Desk(model("A", manual=True))
    assert desk.arrive("r1", "A") == ["reject r1 ModelNotLoaded"]
    assert desk.tell(LoadRequested("A", 1)) == ["desire A 1"]
    assert desk.arrive("r2", "A") == []
    assert desk.boot("A", "A#1") == ["grant r2 A#1"]


def test_unloading_of_what_waits_to_load() -> None:
    desk = Desk(model("A", fallbacks=("B",)), model("B"), gpus=2)
    desk.arrive("r1", "A")
    assert desk.tell(UnloadRequested("A")) == ["desire A 0", "desire B 1"]
    desk.tell(Ticked())
    assert desk.boot("B", "B#1") == ["grant r1 B#1"]


def test_retry_after_grows_with_the_line_up_to_twenty_seconds() -> None:
    desk = Desk(model("A", max_queued=20))
    desk.arrive("r0", "A")
    desk.boot("A", "A#1")
    desk.at(4.0)
    desk.release("r0")
    for index in range(1, 22):
        desk.arrive(f"r{index}", "A")
    assert desk.arrive("r99", "A") == ["reject r99 QueueFull"]
    told = {"queue_position": 21, "expected_wait_s": 84.0, "overloaded": True}
    assert desk.extras() == {"retry_after": 20.0, **told}
    assert desk.arrive("r100", "A", priority=1) == ["reject r100 QueueFull"]
    told = {"queue_position": 1, "expected_wait_s": 4.0, "overloaded": False}
    assert desk.extras() == {"retry_after": 4.0, **told}, "it would stand before all of them"


def test_many_cancelled_leave_a_short_line() -> None:
    """Lines and lanes are rebuilt when most of them is gone; the order stays."""
    desk = loaded()
    desk.arrive("first", "A")
    for index in range(99):
        desk.arrive(f"r{index}", "A", timeout=1000.0 - index)
    for index in [*range(1, 98)]:
        desk.tell(RequestCancelled(f"r{index}"))
    assert desk.release("first") == ["grant r0 A#1"]
    assert desk.release("r0") == ["grant r98 A#1"]
