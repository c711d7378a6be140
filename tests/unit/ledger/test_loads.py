"""Loads: failed, hanging, ordered by an operator, kept without demand, announced in strange ways."""

from __future__ import annotations

import pytest

from cluster.ledger.events import (
    HolderAnnounced,
    LoadRequested,
    NodesChanged,
    ReplicaFailed,
    ReplicaGone,
    ReplicaReady,
    ReplicaStarted,
    RequestCancelled,
    UnloadRequested,
)
from cluster.ledger.specs import NodeSpec
from tests.unit.ledger.desk import Desk, model


def fail_once(desk: Desk, request: str, replica: str) -> float:
    """A load fails; the pause that follows."""
    assert desk.arrive(request, "A") == ["desire A 1"]
    desk.tell(ReplicaStarted("A", replica, "n"))
    assert desk.tell(ReplicaFailed(replica, "broken")) == [f"reject {request} ModelUnavailable", "desire A 0"]
    desk.gone(replica)
    pause: float = desk.ledger.snapshot().models["A"].backoff_until - desk.now
    return pause


@pytest.mark.parametrize("still_there", [False, True])
def test_an_operators_load_outlives_the_keep_alive_of_an_earlier_stay(still_there: bool) -> None:
    desk = Desk(model("A", idle_timeout_s=100.0))
    desk.arrive("r1", "A", keep_alive=0.0)
    desk.boot("A", "A#1")
    assert desk.release("r1") == ["quiesce A#1", "desire A 0"]
    if still_there:
        desk.tell(LoadRequested("A", 1))
    desk.gone("A#1")
    if not still_there:
        desk.tell(LoadRequested("A", 1))
    assert desk.boot("A", "A#2") == []
    assert desk.at(99.0) == []
    assert desk.at(100.0) == ["quiesce A#2", "desire A 0"]
    desk.gone("A#2")
    desk.arrive("r2", "A", keep_alive=-1)
    desk.boot("A", "A#3")
    desk.release("r2")
    desk.tell(LoadRequested("A", 1))
    assert desk.ledger.snapshot().models["A"].pinned is True


@pytest.mark.parametrize(("max_asleep", "load_s"), [(None, 0.5), (0, 3.5)])
def test_the_start_of_a_process_that_stays_is_no_part_of_what_a_load_takes(
    max_asleep: int | None, load_s: float
) -> None:
    """It is started once, and what the next swaps take decides how long a model keeps its place."""
    desk = Desk(model("A"), max_asleep=max_asleep)
    desk.arrive("r1", "A")
    desk.now = 3.0
    desk.tell(ReplicaStarted("A", "A#1", "n"))
    desk.now = 3.5
    assert desk.tell(ReplicaReady("A#1")) == ["grant r1 A#1"]
    assert desk.ledger.snapshot().models["A"].load_s == load_s


def test_back_off_doubles_up_to_its_longest() -> None:
    desk = Desk(model("A"), backoff_s=(1.0, 5.0))
    pauses = []
    for index in range(5):
        pauses.append(fail_once(desk, f"r{index}", f"A#{index}"))
        assert desk.arrive(f"x{index}", "A") == [f"reject x{index} ModelUnavailable"]
        assert desk.extras() == {"retry_after": pauses[-1]}
        desk.at(desk.now + pauses[-1])
    assert pauses == [1.0, 2.0, 4.0, 5.0, 5.0]
    desk.arrive("r", "A")
    assert desk.boot("A", "A#9") == ["grant r A#9"]
    assert desk.ledger.snapshot().models["A"].backoff_until is None


def test_process_that_dies_while_it_loads_is_tried_again() -> None:
    desk = Desk(model("A"), backoff_s=(1.0, 60.0))
    desk.arrive("r1", "A")
    said = []
    for index in range(3):
        desk.tell(ReplicaStarted("A", f"A#{index}", "n"))
        said.append(desk.gone(f"A#{index}"))
        said.append(desk.at(desk.now + 2.0**index))
    assert said == [["desire A 0"], ["desire A 1"]] * 2 + [["reject r1 ModelUnavailable", "desire A 0"], []]


@pytest.mark.parametrize("announced", [False, True])
def test_load_that_takes_too_long(announced: bool) -> None:
    desk = Desk(model("A", load_timeout_s=20.0))
    desk.arrive("r1", "A")
    if announced:
        desk.tell(ReplicaStarted("A", "A#1", "n"))
    assert desk.at(20.0) == ["reject r1 BackendTimeout", "desire A 0"]
    assert desk.state("A#1") == ("STOPPING" if announced else None)


def test_failure_of_one_replica_leaves_the_others() -> None:
    desk = Desk(model("A", max_replicas=2), gpus=2)
    desk.arrive("r1", "A")
    desk.boot("A", "A#1")
    assert desk.arrive("r2", "A") == ["desire A 2"]
    desk.tell(ReplicaStarted("A", "A#2", "n"))
    assert desk.tell(ReplicaFailed("A#2", "no")) == ["desire A 1"]
    assert desk.release("r1") == ["grant r2 A#1"]


def test_order_loads_all_or_nothing() -> None:
    desk = Desk(model("A", max_replicas=3), gpus=3)
    assert desk.tell(LoadRequested("A", 3)) == ["desire A 3"]
    desk.boot("A", "A#1")
    desk.tell(ReplicaStarted("A", "A#2", "n"))
    # One fails: the one that is ready is closed, the one that loads is taken back, the one without a process is gone.
    assert desk.tell(ReplicaFailed("A#2", "no")) == ["quiesce A#1", "desire A 0"]
    assert desk.gone("A#1", "A#2") == []
    assert desk.ledger.snapshot().replicas == ()


def test_order_takes_back_what_has_begun_to_load() -> None:
    desk = Desk(model("A", max_replicas=3), gpus=3)
    desk.tell(LoadRequested("A", 3))
    for index in range(3):
        desk.tell(ReplicaStarted("A", f"A#{index}", "n"))
    desk.tell(ReplicaFailed("A#0", "no"))
    assert [desk.state(f"A#{index}") for index in range(3)] == ["STOPPING", "STOPPING", "STOPPING"]


def test_order_survives_the_death_of_one_of_its_own() -> None:
    desk = Desk(model("A", max_replicas=2), gpus=2, backoff_s=(1.0, 60.0))
    desk.tell(LoadRequested("A", 2))
    desk.boot("A", "A#1")
    desk.tell(ReplicaStarted("A", "A#2", "n"))
    assert desk.gone("A#2") == ["desire A 1"]
    assert desk.at(1.0) == ["desire A 2"]
    assert desk.boot("A", "A#3") == []
    assert desk.ledger.snapshot().models["A"].loading is False


def test_order_waits_for_room_then_gives_up() -> None:
    desk = Desk(model("A", max_replicas=2, load_timeout_s=30.0), model("P", pinned=True), gpus=2)
    desk.warm("P", "P#1")
    assert desk.tell(LoadRequested("A", 2)) == []
    assert desk.ledger.next_deadline() is not None
    assert desk.at(30.0) == ["refuse A BackendTimeout"]
    assert desk.extras() == {"phase": "queued"}


def test_order_evicts_for_all_of_its_replicas_or_for_none() -> None:
    desk = Desk(model("A", max_replicas=2), model("B"), model("C"), gpus=2)
    desk.warm("B", "B#1")
    desk.warm("C", "C#1")
    assert desk.tell(LoadRequested("A", 2)) == ["quiesce B#1", "quiesce C#1", "desire B 0", "desire C 0"]
    assert desk.gone("B#1") == []
    assert desk.gone("C#1") == ["desire A 2"]


def test_order_is_refused_at_once() -> None:
    desk = Desk(model("A", max_replicas=4), gpus=2)
    assert desk.tell(LoadRequested("nobody", 1)) == ["refuse nobody ModelNotFound"]
    assert desk.tell(LoadRequested("A", 0)) == ["refuse A InvalidRequest"]
    assert desk.tell(LoadRequested("A", 5)) == ["refuse A InvalidRequest"]
    assert desk.tell(LoadRequested("A", 3)) == ["refuse A MemoryBudgetExceeded"]
    desk.arrive("r1", "A")
    desk.boot("A", "A#1")
    assert desk.tell(LoadRequested("A", 1)) == []
    desk.tell(UnloadRequested("A"))
    assert desk.tell(LoadRequested("A", 1)) == ["refuse A ModelUnavailable"]


def test_order_ends_a_pause() -> None:
    desk = Desk(model("A"), backoff_s=(50.0, 60.0))
    fail_once(desk, "r1", "A#1")
    assert desk.tell(LoadRequested("A", 1)) == ["desire A 1"]


def test_floor_and_preload() -> None:
    desk = Desk(model("A", min_replicas=1), model("B", preload=True, idle_timeout_s=10.0), gpus=2)
    assert sorted(desk.at(0.0)) == ["desire A 1", "desire B 1"]
    desk.boot("A", "A#1")
    desk.boot("B", "B#1")
    assert desk.at(10.0) == ["quiesce B#1", "desire B 0"]
    assert desk.gone("B#1") == []
    # What is kept comes back after it died; what an operator took away does not.
    desk.gone("A#1")
    assert desk.ledger.desired["A"] == 1
    desk.boot("A", "A#2")
    assert desk.tell(UnloadRequested("A")) == ["quiesce A#2", "desire A 0"]
    assert desk.gone("A#2") == []
    desk.arrive("r1", "A")
    assert desk.ledger.desired["A"] == 1


def test_floor_comes_again_after_a_failed_load() -> None:
    desk = Desk(model("A", min_replicas=1), backoff_s=(2.0, 60.0))
    desk.at(0.0)
    desk.tell(ReplicaStarted("A", "A#1", "n"))
    desk.tell(ReplicaFailed("A#1", "no"))
    desk.gone("A#1")
    assert desk.ledger.next_deadline() == 2.0
    assert desk.at(2.0) == ["desire A 1"]


def test_floor_is_not_withdrawn_with_its_waiters() -> None:
    desk = Desk(model("A", min_replicas=1))
    desk.at(0.0)
    desk.arrive("r1", "A")
    assert desk.tell(RequestCancelled("r1")) == []


def test_preload_is_not_withdrawn_with_its_waiters() -> None:
    desk = Desk(model("A", preload=True))
    desk.at(0.0)
    desk.arrive("r1", "A")
    assert desk.tell(RequestCancelled("r1")) == []


def test_announcements_in_any_order_and_twice() -> None:
    desk = Desk(model("A", slots=2))
    desk.arrive("r1", "A")
    # Readiness overtakes the announcement.
    assert desk.tell(ReplicaReady("A#1")) == []
    assert desk.tell(ReplicaStarted("A", "A#1", "n")) == ["grant r1 A#1"]
    assert desk.tell(ReplicaStarted("A", "A#1", "n"), ReplicaReady("A#1")) == []
    desk.gone("A#1")
    # The dead do not come back, and the unknown are remembered as dead.
    assert desk.tell(ReplicaStarted("A", "A#1", "n"), ReplicaReady("A#1")) == []
    desk.gone("ghost")
    assert desk.tell(ReplicaStarted("A", "ghost", "n")) == []
    assert desk.tell(ReplicaStarted("nobody", "X#1", "n")) == []


def test_early_readiness_is_bounded() -> None:
    desk = Desk(model("A"))
    desk.tell(*(ReplicaReady(f"x{index}") for index in range(2000)))
    assert len(desk.ledger._pool.early_ready) == 1024


def test_unasked_process_is_kept_where_there_is_room() -> None:
    desk = Desk(model("A"), model("B"))
    assert desk.tell(ReplicaStarted("A", "A#1", "n")) == ["desire A 1"]
    desk.tell(ReplicaReady("A#1"))
    assert desk.arrive("r1", "A") == ["grant r1 A#1"]


def test_unasked_process_is_stopped_where_there_is_none() -> None:
    desk = Desk(model("A"), model("B"))
    desk.warm("A", "A#1")
    assert desk.tell(ReplicaStarted("B", "B#1", "n")) == ["desire B 0"]
    assert desk.state("B#1") == "STOPPING"
    assert desk.tell(ReplicaFailed("B#1", "late")) == []
    # It counts until it is really gone, even on a node or device that nobody knows.
    assert desk.tell(ReplicaStarted("B", "B#2", "elsewhere")) == ["desire B 0"]
    assert desk.gone("B#1", "B#2") == []


def test_process_that_ray_put_elsewhere() -> None:
    nodes = {"n": NodeSpec("n", gpus=1), "m": NodeSpec("m", gpus=2)}
    desk = Desk(model("A"), model("B"), nodes=nodes)
    desk.arrive("a1", "A")
    assert desk.boot("A", "A#1", "m") == ["grant a1 A#1"]
    desk.arrive("b1", "B")
    assert desk.boot("B", "B#1", "m") == ["grant b1 B#1"]
    assert [each.node for each in desk.ledger.snapshot().replicas] == ["m", "m"]


def test_measured_memory_replaces_the_estimate() -> None:
    nodes = {"n": NodeSpec("n", gpus=2, memory_mib=1000)}
    desk = Desk(model("A", memory_mib=100), model("B", memory_mib=500), nodes=nodes)
    desk.arrive("a1", "A")
    desk.boot("A", "A#1", memory=700)
    assert desk.ledger.snapshot().models["A"].memory_mib == 700
    assert desk.arrive("b1", "B") == [], "beside what A really takes there is no room"
    assert desk.release("a1")[:1] == ["quiesce A#1"]
    assert desk.gone("A#1") == ["desire B 1"]


def test_engine_that_took_more_than_there_is() -> None:
    nodes = {"n": NodeSpec("n", gpus=2, memory_mib=1000)}
    desk = Desk(model("A", memory_mib=100), nodes=nodes)
    desk.arrive("a1", "A")
    desk.boot("A", "A#1", memory=1700)
    desk.release("a1")
    assert desk.arrive("a2", "A") == ["grant a2 A#1"]
    desk.gone("A#1")
    assert desk.arrive("a3", "A") == ["reject a3 MemoryBudgetExceeded"]


def test_dead_process_takes_its_leases_along() -> None:
    desk = Desk(model("A", slots=2))
    desk.arrive("r1", "A")
    desk.boot("A", "A#1")
    desk.arrive("r2", "A")
    assert desk.tell(ReplicaGone("A#1"), ReplicaGone("A#1")) == ["desire A 0"]
    assert desk.release("r1") == []
    # A retry of the same request, within the same deadline, is welcome.
    assert desk.arrive("r2", "A") == ["desire A 1"]


def test_what_is_kept_without_demand_starts_when_the_first_machine_comes_after_the_first_ingress() -> None:
    desk = Desk(model("A", min_replicas=1), model("B", preload=True), nodes={})
    assert desk.tell(HolderAnnounced("h", (), ())) == []
    assert desk.tell(NodesChanged({"n": NodeSpec("n", gpus=2)})) == ["desire A 1", "desire B 1"]
