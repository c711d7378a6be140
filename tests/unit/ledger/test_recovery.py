"""A new life of the ledger: it listens, adopts, and only then decides."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.ledger.events import (
    ConfigChanged,
    HolderDied,
    LeaseReannounced,
    LeaseReleased,
    NodesChanged,
    ReplicaGone,
    ReplicaReady,
    ReplicaStarted,
    RequestArrived,
    RequestCancelled,
)
from cluster.ledger.specs import NodeSpec
from tests.unit.ledger.desk import Desk, model


def again(*models: object, **more: object) -> Desk:
    return Desk(*(models or (model("A", slots=2),)), recovering_until=5.0, **more)  # type: ignore[arg-type]


def held(request: str, replica: str = "A#1", generation: int = 7, holder: str = "h") -> LeaseReannounced:
    return LeaseReannounced(request, holder, "A", replica, generation)


def test_nothing_is_decided_before_the_window_closes() -> None:
    desk = again(model("A", slots=2), model("B", min_replicas=1), gpus=2)
    assert desk.ledger.is_recovering
    assert desk.boot("A", "A#1") == []
    assert desk.tell(held("old"), held("old")) == []
    assert desk.arrive("r1", "A") == []
    assert desk.arrive("r2", "A") == []
    assert desk.tell(NodesChanged({"n": NodeSpec("n", gpus=2)})) == []
    assert desk.ledger.next_deadline() == 5.0
    assert desk.at(5.0) == ["grant r1 A#1", "desire A 1", "desire B 1"]
    assert not desk.ledger.is_recovering
    # New numbers begin above the old ones; the old lease is released by its own.
    assert desk.grants["r1"].generation == 8
    assert desk.tell(LeaseReleased("old", 7)) == ["grant r2 A#1"]
    assert desk.tell(held("old")) == [], "it has ended, however late it is announced"


def test_every_desired_count_is_said_once() -> None:
    desk = again(model("A"), model("B"))
    assert desk.at(5.0) == ["desire A 0", "desire B 0"]
    assert desk.at(6.0) == []


def test_deadlines_hold_in_the_window() -> None:
    desk = again()
    desk.arrive("r1", "A", timeout=2.0)
    assert desk.ledger.next_deadline() == 2.0
    assert desk.at(2.0) == ["reject r1 BackendTimeout"]
    desk.arrive("r2", "A", timeout=1.0)
    assert desk.at(2.5) == []
    assert desk.at(3.0) == ["reject r2 BackendTimeout"]


def test_lease_before_its_replica() -> None:
    desk = again()
    desk.tell(held("one"), held("two", generation=8))
    assert desk.boot("A", "A#1") == []
    assert desk.ledger.snapshot().leases == 2
    desk.tell(held("three", generation=9))
    assert desk.ledger.snapshot().leases == 2, "it has two slots"


def test_lease_that_ends_before_its_replica_comes() -> None:
    desk = again()
    desk.tell(held("one"), held("two", generation=8), held("three", generation=9, holder="dead"), held("four", "X#1"))
    desk.tell(LeaseReleased("one", 6), LeaseReleased("one", 7), RequestCancelled("two"), HolderDied("dead"))
    desk.tell(ReplicaGone("X#1"))
    assert desk.tell(held("five", "X#1")) == []
    assert desk.boot("A", "A#1") == []
    assert desk.ledger.snapshot().leases == 0


def test_lease_that_ends_before_it_is_announced() -> None:
    desk = again()
    desk.boot("A", "A#1")
    desk.tell(LeaseReleased("one", 7), held("one"), held("one", generation=8))
    assert list(desk.ledger._pool.leases) == ["one"]
    desk.tell(HolderDied("dead"))
    desk.tell(held("two", holder="dead"))
    assert desk.ledger.snapshot().leases == 1


def test_lease_of_one_that_also_waits() -> None:
    desk = again()
    desk.boot("A", "A#1")
    desk.arrive("r1", "A")
    desk.tell(held("r1"))
    assert desk.ledger.snapshot().queued == 0
    assert desk.at(5.0) == ["desire A 1"]


def test_orphans_are_bounded_and_forgotten() -> None:
    desk = again()
    for index in range(10_100):
        desk.ledger.decide(held(f"r{index}", "nobody", index), 0.0)
    assert sum(map(len, desk.ledger._pool.orphans.values())) == 10_000
    desk.at(5.0)
    assert desk.ledger._pool.orphans, "their replicas may come after the window, too"
    desk.at(61.0)
    assert not desk.ledger._pool.orphans


def test_waiters_of_what_cannot_be_served_are_refused_when_the_window_closes() -> None:
    desk = again(model("M", manual=True), model("big", num_gpus=4.0), model("A"), model("gone"))
    for name in ("M", "big", "A"):
        desk.arrive(name, name)
    desk.tell(ConfigChanged(replace(desk.spec, models={k: v for k, v in desk.spec.models.items() if k != "gone"})))
    said = desk.at(5.0)
    assert {"reject M ModelNotLoaded", "reject big MemoryBudgetExceeded", "desire A 1"} <= set(said)


def test_manual_model_that_runs_is_served() -> None:
    desk = again(model("M", manual=True))
    desk.arrive("m1", "M")
    desk.boot("M", "M#1")
    assert desk.at(5.0) == ["grant m1 M#1", "desire M 1"]


def test_more_than_there_is_room_for_is_adopted_and_drained_later() -> None:
    desk = again(model("A", max_replicas=1))
    for uid in ("A#1", "A#2"):
        desk.tell(ReplicaStarted("A", uid, "n"), ReplicaReady(uid))
    desk.tell(ReplicaStarted("A", "A#3", "nowhere"))
    assert desk.at(5.0) == ["desire A 3"], "Serve might stop the one that is to stay in another's stead"
    assert desk.gone("A#3") == ["quiesce A#2", "desire A 1"]


def test_arrival_told_again_after_a_restart() -> None:
    desk = again()
    desk.boot("A", "A#1")
    desk.tell(held("old"))
    assert desk.tell(RequestArrived("old", "h", "A", 2, 600.0)) == ["grant old A#1"]


def test_lease_is_held_by_one_that_loads_again() -> None:
    desk = again()
    desk.tell(ReplicaStarted("A", "A#1", "n"), held("one"))
    assert desk.ledger.snapshot().leases == 0
    desk.tell(ReplicaReady("A#1"))
    assert desk.ledger.snapshot().leases == 1


@pytest.mark.parametrize("limits", [{"offload_queue_threshold": 3}, {}], ids=["offload", "max_queued"])
def test_no_line_is_too_long_in_the_window_while_slots_are_free(limits: dict[str, int]) -> None:
    desk = Desk(model("A", slots=8, max_queued=None if limits else 3), recovering_until=5.0, **limits)
    desk.boot("A", "A#1")
    assert [desk.arrive(f"r{index}", "A") for index in range(8)] == [[]] * 8
    assert [each for each in desk.at(5.0) if each.startswith("grant")] == [f"grant r{index} A#1" for index in range(8)]


@pytest.mark.parametrize("waits", [True, False])
def test_a_replica_that_comes_after_the_window_still_holds_its_leases(waits: bool) -> None:
    desk = again(model("A", slots=2))
    desk.tell(held("old"))
    desk.at(5.0)
    if waits:
        assert desk.arrive("r1", "A") == ["desire A 1"]
    desk.boot("A", "A#1")
    assert desk.state("A#1") == "READY"
    assert desk.ledger.snapshot().leases == 1 + waits
    assert desk.tell(RequestArrived("old", "h", "A", 2, 600.0)) == ["grant old A#1"]
    desk.arrive("r2", "A")
    slots = [each.slots for each in desk.ledger._pool.leases.values()]
    assert len(set(slots)) == len(slots), "a slot is granted twice"


@pytest.mark.parametrize(("before", "now"), [(8, 4), (4, 8)])
def test_leases_survive_a_configuration_with_other_slots(before: int, now: int) -> None:
    """A replica runs what it was loaded for, whatever the configuration of the new life says."""
    desk = again(model("A", slots=now, revision="new"))
    desk.tell(ReplicaStarted("A", "A#1", "n", 1.0, loading=True))
    for index in range(before):
        desk.tell(held(f"r{index}", generation=index + 1))
    desk.tell(ReplicaReady("A#1", slots=before, revision="old"))
    assert desk.ledger.snapshot().leases == before
    assert desk.at(5.0) == ["quiesce A#1", "desire A 1"], "it is out of date"
    assert desk.arrive("next", "A") == [], "there is no room, and no slot of those is granted twice"
    for index in range(before):
        last = desk.tell(LeaseReleased(f"r{index}", index + 1))
    assert last == ["desire A 0"]


def test_a_replica_that_was_loaded_by_another_configuration_is_out_of_date() -> None:
    desk = again(model("A", slots=2, revision="new"))
    desk.tell(ReplicaStarted("A", "A#1", "n", 1.0, loading=True), ReplicaReady("A#1", slots=2, revision="old"))
    assert desk.at(5.0) == ["quiesce A#1", "desire A 0"]
