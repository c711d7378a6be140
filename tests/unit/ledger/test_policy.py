"""Who is drained, and when: tiers, bounds, swaps that pay, residency, growth."""

from __future__ import annotations

import pytest

from cluster.ledger.events import NodesChanged, ReplicaReady, ReplicaStarted, RequestCancelled, UnloadRequested
from cluster.ledger.rules import policy
from cluster.ledger.specs import NodeSpec
from tests.unit.ledger.desk import Desk, model

BOUND = (5.0, 8.0, 12.0)


def test_idle_before_busy_and_least_recently_used_first() -> None:
    desk = Desk(model("A"), model("B"), model("C"), model("X"), gpus=3)
    for now, name in enumerate("BCA"):
        desk.now = float(now)
        desk.warm(name, f"{name}#1")
    desk.now = 5.0
    desk.arrive("b1", "B")
    assert desk.arrive("x1", "X") == ["quiesce C#1", "desire C 0"]


def test_surplus_before_anybody_is_evicted() -> None:
    """B has more than its minimum and does not need it; A is busy with its only one."""
    desk = Desk(model("B", slots=1, max_replicas=2), model("A"), model("X"), gpus=3, load_prior_s=0.0)
    desk.arrive("a1", "A")
    desk.boot("A", "A#1")
    desk.arrive("b1", "B")
    desk.boot("B", "B#1")
    desk.arrive("b2", "B")
    desk.boot("B", "B#2")
    desk.release("b1")
    assert desk.arrive("x1", "X") == ["quiesce B#2"]
    # The older one is empty and stays; the newer one drains.
    assert desk.arrive("b3", "B") == ["grant b3 B#1"]


def test_classes_have_their_own_bounds() -> None:
    for priority, bound in enumerate(BOUND, start=1):
        desk = Desk(
            model("A"), model("B"), bound_s=BOUND, load_prior_s=0.0, residency_loads=1000.0, min_residency_s=1e9
        )
        desk.arrive("a1", "A", priority=1)
        desk.boot("A", "A#1")
        desk.arrive("b1", "B", priority=priority)
        desk.arrive("b2", "B", priority=3)
        assert desk.at(bound - 0.01) == []
        assert desk.at(bound) == ["quiesce A#1"]


@pytest.mark.parametrize(
    ("load_s", "bounds"), [(0.1, [5.0, 15.0, 40.0]), (4.0, [12.0, 32.0, 80.0]), (60.0, [180.0, 480.0, 1200.0])]
)
def test_a_bound_that_is_not_configured_fits_what_a_swap_costs(load_s: float, bounds: list[float]) -> None:
    desk = Desk(model("A"), bound_s=(None, None, 7.0), load_prior_s=load_s)
    pool = desk.ledger._pool
    fitting = [policy.bound_s(pool, pool.models["A"], priority) for priority in (1, 2, 3)]
    assert fitting == [*bounds[:2], 7.0]
    desk = Desk(model("A"))
    desk.arrive("a1", "A")
    desk.tell(ReplicaStarted("A", "A#1", "n"))
    desk.now = load_s
    desk.tell(ReplicaReady("A#1"))
    pool = desk.ledger._pool
    assert [policy.bound_s(pool, pool.models["A"], priority) for priority in (1, 2, 3)] == bounds, "as it was learned"


def test_a_drain_begins_early_enough_for_the_load() -> None:
    desk = Desk(model("A"), model("B"), bound_s=(30.0, 60.0, 120.0), load_prior_s=4.0, min_residency_s=1e9)
    desk.arrive("a1", "A", priority=1)
    desk.boot("A", "A#1")
    desk.arrive("b1", "B", priority=1)
    assert desk.at(30.0 - policy.LEAD * 4.0 - 0.1) == []
    assert desk.at(30.0 - policy.LEAD * 4.0) == ["quiesce A#1"]


def test_a_drain_begins_early_enough_for_the_drain() -> None:
    """Before anybody has drained, the longest lease seen stands for a drain; then what drains take."""
    desk = Desk(model("A", slots=2), model("B"), bound_s=(30.0,) * 3, load_prior_s=0.0, min_residency_s=1e9)
    desk.arrive("a1", "A")
    desk.boot("A", "A#1")
    desk.arrive("a2", "A")
    desk.at(4.0)
    desk.release("a1")
    desk.arrive("b1", "B")
    first = 4.0 + 30.0 - policy.LEAD * 4.0
    assert desk.at(first - 0.01) == []
    assert desk.at(first) == ["quiesce A#1"]
    desk.arrive("a3", "A")
    desk.now = first + 2.0
    desk.release("a2")
    desk.gone("A#1")
    assert desk.boot("B", "B#1")[0] == "grant b1 B#1"
    second = first + 30.0 - policy.LEAD * 2.0
    assert desk.at(second - 0.01) == []
    assert desk.at(second) == ["quiesce B#1"]


def test_swap_that_pays() -> None:
    """A never pauses; a crowd waits for B: long before any bound the swap is worth more than it costs."""
    desk = Desk(model("A", slots=2), model("B", slots=8), bound_s=(1e6,) * 3, load_prior_s=0.0, min_residency_s=10.0)
    number = 0

    def flood(until: float) -> list[str]:
        nonlocal number
        said = []
        while desk.now < until:
            number += 1
            said += desk.at(desk.now + 0.5)
            if f"a{number - 2}" in desk.grants:
                said += desk.release(f"a{number - 2}")
            said += desk.arrive(f"a{number}", "A")
            if number == 1:
                desk.boot("A", "A#1")
        return [each for each in said if not each.startswith("grant")]

    assert flood(9.0) == ["desire A 1"]
    for index in range(8):
        desk.arrive(f"b{index}", "B")
    assert flood(10.0) == [], "not within the residency"
    assert "quiesce A#1" in flood(40.0)


def test_swap_that_does_not_pay() -> None:
    desk = Desk(model("A", slots=2), model("B"), bound_s=(1e6,) * 3, load_prior_s=10.0)
    desk.arrive("a1", "A")
    desk.boot("A", "A#1")
    desk.at(2.0)
    desk.release("a1")
    desk.arrive("a2", "A")
    desk.arrive("b1", "B", priority=3)
    assert desk.at(4.0) == []
    assert desk.release("a2") == ["quiesce A#1", "desire A 0"], "when A pauses, B gets in"


def test_idleness_of_no_time_does_not_keep_the_clock_busy() -> None:
    desk = Desk(model("A", slots=1, max_replicas=2), gpus=2)
    for request in ("r1", "r2"):
        desk.arrive(request, "A", keep_alive=0.0)
    desk.boot("A", "A#1")
    desk.boot("A", "A#2")
    for now in (0.0, 0.5, 1.0, 1.5):
        desk.at(now)
        due = desk.ledger.next_deadline()
        assert due is not None
        assert due > now


def test_second_replica_comes_when_one_is_not_enough() -> None:
    desk = Desk(model("A", slots=2, max_replicas=2), gpus=2, upscale_wait_s=3.0)
    desk.arrive("r1", "A")
    desk.arrive("r2", "A")
    desk.boot("A", "A#1")
    assert desk.arrive("r3", "A") == []
    assert desk.ledger.next_deadline() == 3.0
    assert desk.at(3.0) == ["desire A 2"]
    assert desk.tell(RequestCancelled("r3")) == ["desire A 1"]
    desk.arrive("r4", "A")
    assert desk.arrive("r5", "A") == ["desire A 2"], "a whole replica's worth waits"


def test_second_replica_takes_what_others_leave() -> None:
    desk = Desk(model("A", slots=1, max_replicas=3), model("B"), model("C"), gpus=2)
    desk.arrive("c1", "C")
    desk.boot("C", "C#1")
    desk.arrive("a1", "A")
    desk.boot("A", "A#1")
    desk.arrive("a2", "A")
    desk.now = 1.0
    desk.arrive("b1", "B")
    # A's growth waits for longer, but B has nothing at all.
    assert desk.gone("C#1") == ["desire C 0", "desire B 1"]


def test_second_replica_takes_a_warm_place_only_if_that_has_rested() -> None:
    desk = Desk(model("A", slots=1, max_replicas=2), model("B"), gpus=2, load_prior_s=5.0)
    desk.arrive("b0", "B")
    desk.tell(ReplicaStarted("B", "B#1", "n"))
    desk.now = 4.0
    desk.boot("B", "B#1")
    desk.release("b0")
    desk.arrive("a1", "A")
    desk.boot("A", "A#1")
    assert desk.arrive("a2", "A") == []
    assert desk.at(6.0) == [], "B was idle for less than it would take to load it again"
    assert desk.at(8.3) == ["quiesce B#1", "desire B 0"]


def test_waits_are_split_into_queue_and_load() -> None:
    desk = Desk(model("A"), model("B"), bound_s=BOUND, load_prior_s=0.0)
    desk.arrive("a1", "A")
    desk.boot("A", "A#1")
    desk.arrive("b1", "B", priority=1)
    desk.at(5.0)
    desk.now = 7.0
    desk.release("a1")
    desk.gone("A#1")
    desk.now = 10.0
    desk.boot("B", "B#1")
    assert desk.grants["b1"].queue_wait_s == 7.0
    assert desk.grants["b1"].load_wait_s == 3.0


def test_learned_stop_time() -> None:
    desk = Desk(model("A"), model("B"))
    desk.warm("A", "A#1")
    desk.arrive("b1", "B")
    desk.now = 2.0
    desk.gone("A#1")
    assert desk.ledger._pool.stop_s > 0.0


def test_rate_and_busy_time() -> None:
    desk = Desk(model("A"))
    books = desk.ledger._pool.models["A"]
    assert policy.arrival_rate(books, 0.0) == 0.0
    assert policy.busy_time(books, 0.0) == 0.0
    assert policy.best_class(books) == 4
    for index in range(3):
        desk.now = float(index)
        desk.arrive(f"r{index}", "A", priority=3 - index)
    assert policy.arrival_rate(books, 2.0) == 1.0
    assert policy.arrival_rate(books, 12.0) == 0.1
    assert policy.best_class(books) == 1


def test_a_waiters_own_deadline_is_a_bound() -> None:
    """It is not the first in line that gives up first; when it has, the next one's deadline counts."""
    desk = Desk(model("A"), model("B"), bound_s=(1e6,) * 3, load_prior_s=4.0, min_residency_s=1e9)
    desk.arrive("a1", "A")
    desk.boot("A", "A#1")
    desk.arrive("b1", "B", timeout=600.0)
    desk.arrive("b2", "B", timeout=30.0)
    desk.arrive("b3", "B", timeout=40.0)
    assert desk.tell(RequestCancelled("b2")) == []
    due = 40.0 - policy.LEAD * 4.0
    assert desk.at(due - 0.1) == []
    assert desk.at(due) == ["quiesce A#1"]


def grown(measured: int = 1250, **more: object) -> Desk:
    """A model that was measured to take more than its node has."""
    nodes = {"n": NodeSpec("n", gpus=2, memory_mib=1200)}
    desk = Desk(model("A", memory_mib=1000, **more), nodes=nodes)
    desk.arrive("r1", "A")
    assert desk.boot("A", "A#1", memory=measured) == ["grant r1 A#1"]
    return desk


def test_a_model_that_serves_is_not_too_large() -> None:
    desk = grown()
    assert desk.arrive("r2", "A") == []
    assert desk.tell(NodesChanged(desk.spec.nodes)) == []
    assert desk.release("r1") == ["grant r2 A#1"]


def test_a_model_that_was_measured_too_large_is_not_loaded_again() -> None:
    desk = grown()
    desk.gone("A#1")
    assert desk.arrive("r2", "A") == ["reject r2 MemoryBudgetExceeded"]


def test_a_measurement_falls_with_the_next_load() -> None:
    desk = grown(measured=1100)
    desk.release("r1")
    desk.tell(UnloadRequested("A"))
    desk.gone("A#1")
    desk.arrive("r2", "A")
    desk.boot("A", "A#2", memory=900)
    assert desk.ledger.snapshot().models["A"].memory_mib == 900


def test_the_largest_of_those_that_run_counts() -> None:
    desk = grown(measured=500, max_replicas=2)
    desk.arrive("r2", "A")
    desk.boot("A", "A#2", memory=400)
    assert desk.ledger.snapshot().models["A"].memory_mib == 500
