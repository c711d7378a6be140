"""Serve has told a replica to stop, asked by this life of the ledger, by a former one, or for reasons of its own."""

from __future__ import annotations

import pytest

from cluster.ledger.events import (
    EngineUnloaded,
    LeaseReannounced,
    ReplicaReady,
    ReplicaStarted,
    ReplicaStopping,
)
from tests.unit.ledger.desk import Desk, model


def told(*replicas: str) -> list[ReplicaStopping]:
    return [ReplicaStopping(each) for each in replicas]


@pytest.mark.parametrize("max_asleep", [0, None])
def test_nobody_new_gets_in_and_what_runs_ends(max_asleep: int | None) -> None:
    desk = Desk(model("A", slots=2), gpus=2, max_asleep=max_asleep)
    desk.arrive("a1", "A")
    desk.boot("A", "A#1")
    assert desk.tell(*told("A#1", "A#1")) == ["quiesce A#1", "desire A 0"], "Serve counts it no more"
    assert desk.arrive("a2", "A") == ["desire A 1"], "another starts beside it"
    assert desk.release("a1") == [], "nobody there obeys an order to unload"
    assert desk.state("A#1") == "STOPPING"
    if max_asleep == 0:
        assert desk.gone("A#1") == []
    desk.tell(ReplicaStarted("A", "A#2", "n", 2.0))
    assert desk.boot("A", "A#2") == ["grant a2 A#2"]
    assert desk.tell(*told("unknown")) == []


def test_one_that_loads_or_sleeps_is_gone_for_the_ledger() -> None:
    desk = Desk(model("A"), model("B"), max_asleep=None)
    desk.warm("A", "A#1")
    desk.arrive("b1", "B")
    desk.tell(EngineUnloaded("A#1"), ReplicaStarted("B", "B#1", "n"))
    assert (desk.state("A#1"), desk.state("B#1")) == ("ASLEEP", "LOADING")
    assert desk.tell(*told("A#1", "B#1")) == ["desire A 0", "desire B 0"]
    assert (desk.state("A#1"), desk.state("B#1")) == ("STOPPING", "STOPPING")
    assert desk.tell(*told("A#1")) == []
    assert desk.gone("B#1") == ["desire B 1"]


def test_one_that_ends_its_engine_has_nothing_more_to_do() -> None:
    desk = Desk(model("A"), model("B"), max_asleep=None)
    desk.warm("A", "A#1")
    desk.arrive("b1", "B")
    assert desk.tell(*told("A#1")) == ["desire A 0"]
    assert desk.state("A#1") == "UNLOADING"
    desk.tell(ReplicaStarted("B", "B#1", "n"))
    desk.gone("A#1")
    assert [each.replica for each in desk.loads][-1] == "B#1"


def test_one_that_dies_is_counted_no_more() -> None:
    desk = Desk(model("A"))
    desk.arrive("a1", "A")
    desk.boot("A", "A#1")
    desk.tell(*told("A#1"))
    assert desk.gone("A#1") == []
    assert desk.ledger.snapshot().leases == 0


def test_another_stays_whom_serve_would_have_stopped_first() -> None:
    desk = Desk(model("A", min_replicas=2, max_replicas=2), gpus=2)
    desk.at(0.0)
    desk.tell(ReplicaStarted("A", "old", "n", 1.0), ReplicaStarted("A", "new", "n", 2.0))
    desk.tell(ReplicaReady("old"), ReplicaReady("new"))
    desk.arrive("a1", "A")
    desk.arrive("a2", "A")
    assert desk.tell(*told("old")) == ["quiesce old", "desire A 1"]
    desk.release(next(each for each, grant in desk.grants.items() if grant.replica == "old"))
    assert (desk.state("old"), desk.state("new")) == ("STOPPING", "READY")
    assert desk.gone("old") == ["desire A 2"]


@pytest.mark.parametrize("stopping", [True, False])
def test_a_new_life_hears_of_it(stopping: bool) -> None:
    """Before the window closes Serve has told the replica. If it has not, it hears of a higher count in time."""
    desk = Desk(model("A", slots=2), recovering_until=5.0)
    desk.tell(ReplicaStarted("A", "A#1", "n", 1.0, loading=True, stopping=stopping), ReplicaReady("A#1"))
    desk.tell(LeaseReannounced("old", "h", "A", "A#1", 7))
    desk.arrive("a1", "A")
    if stopping:
        assert desk.at(5.0) == ["quiesce A#1", "desire A 0"], "the count that Serve was told already"
        assert desk.ledger.snapshot().leases == 1
    else:
        assert desk.at(5.0) == ["grant a1 A#1", "desire A 1"]
        assert desk.tell(*told("A#1")) == ["quiesce A#1", "desire A 0"], "Serve was faster: what runs may end"
        assert desk.ledger.snapshot().leases == 2
        assert desk.arrive("a2", "A") == []


def test_the_usual_course_of_things_changes_nothing() -> None:
    desk = Desk(model("A", idle_timeout_s=1.0))
    desk.warm("A", "A#1")
    assert desk.at(1.0) == ["quiesce A#1", "desire A 0"]
    assert desk.tell(*told("A#1")) == []
    assert (desk.state("A#1"), desk.ledger.desired) == ("STOPPING", {"A": 0})


def test_a_start_that_nobody_asked_for_does_not_hold_up_those_that_make_room() -> None:
    """Serve would stop the newer one first, and the claim would wait for both."""
    desk = Desk(model("A", max_replicas=2), model("B"), bound_s=(1.0, 1.0, 1.0), load_prior_s=0.0, gpus=1)
    desk.arrive("a1", "A")
    desk.boot("A", "A#1")
    desk.arrive("b1", "B")
    assert desk.at(1.0) == ["quiesce A#1"]
    desk.tell(ReplicaStarted("A", "A#2", "n", 2.0))
    assert desk.state("A#2") == "STOPPING"
