"""The drain guard: new leases stop first, the last lease ends, then the replica stops, then its room is free."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.ledger.events import (
    ConfigChanged,
    LeaseReleased,
    LoadRequested,
    NodesChanged,
    ReplicaFailed,
    ReplicaReady,
    ReplicaStarted,
    RequestCancelled,
    UnloadRequested,
)
from cluster.ledger.specs import NodeSpec
from tests.unit.ledger.desk import Desk, model

BOUND = (5.0, 8.0, 12.0)


def contended() -> Desk:
    """A is loaded and serves `a1` on one of its two slots; B waits at class 1, and its bound has come."""
    desk = Desk(model("A", slots=2), model("B", slots=2), bound_s=BOUND, load_prior_s=0.0)
    desk.arrive("a1", "A", priority=1)
    desk.boot("A", "A#1")
    assert desk.arrive("b1", "B", priority=1) == []
    assert desk.at(5.0) == ["quiesce A#1"]
    return desk


def test_a_swap_step_by_step() -> None:
    desk = contended()
    assert desk.arrive("a2", "A") == [], "it drains, though a slot is free"
    assert desk.release("a1") == ["desire A 0"]
    assert desk.state("A#1") == "STOPPING"
    assert desk.gone("A#1") == ["desire B 1"]
    assert desk.tell(ReplicaStarted("B", "B#1", "n")) == []
    # The waiter is granted in the very step in which its model gets ready, so nobody can evict it before.
    assert desk.tell(ReplicaReady("B#1"))[0] == "grant b1 B#1"


@pytest.mark.parametrize("late", [0.0, 30.0])
def test_regression_load_while_the_previous_models_memory_is_not_yet_free(late: float) -> None:
    desk = contended()
    desk.release("a1")
    assert desk.at(5.0 + late) == []
    assert desk.ledger.desired == {"A": 0, "B": 0}
    assert desk.gone("A#1") == ["desire B 1"]


def test_regression_victim_revived_between_choice_and_stop() -> None:
    """Until it is told to stop, a victim may be opened again; from then on never."""
    desk = contended()
    assert desk.tell(RequestCancelled("b1")) == ["reopen A#1"]
    assert desk.arrive("a2", "A") == ["grant a2 A#1"]
    desk = contended()
    desk.release("a1")
    assert desk.tell(RequestCancelled("b1")) == []
    assert desk.arrive("a2", "A") == []
    assert desk.state("A#1") == "STOPPING"
    assert desk.gone("A#1") == ["desire A 1"]


def test_regression_just_loaded_model_evicted_before_its_waiter_holds_a_slot() -> None:
    desk = contended()
    desk.arrive("a2", "A", priority=1)
    desk.release("a1")
    desk.gone("A#1")
    desk.now = 60.0
    # Long over its own bound, A's waiter does not get in between B's load and B's grant.
    assert desk.boot("B", "B#1") == ["grant b1 B#1"]
    assert desk.at(61.0) == ["quiesce B#1"]


def test_regression_request_routed_into_a_stopping_replica() -> None:
    desk = contended()
    desk.release("a1")
    assert desk.state("A#1") == "STOPPING"
    assert desk.arrive("a2", "A") == []


def test_regression_request_meets_an_idle_unload() -> None:
    """A request that comes when the idle timeout strikes either gets the slot, or waits for a new process."""
    desk = Desk(model("A", idle_timeout_s=5.0))
    desk.warm("A", "A#1")
    desk.now = 5.0
    assert desk.arrive("r1", "A") == ["grant r1 A#1"]
    assert desk.at(20.0) == []
    desk.release("r1")
    assert desk.at(25.0) == ["quiesce A#1", "desire A 0"]
    assert desk.arrive("r2", "A") == []
    assert desk.gone("A#1") == ["desire A 1"]
    assert desk.boot("A", "A#2") == ["grant r2 A#2"]


def test_regression_leaked_in_flight_count_pins_memory() -> None:
    """However leases end, none is left over, and the model can be unloaded."""
    desk = Desk(model("A", slots=4))
    for request in ("r1", "r2", "r3", "r4"):
        desk.arrive(request, "A", holder=f"h{request}")
    desk.boot("A", "A#1")
    desk.release("r1")
    desk.tell(LeaseReleased("r1", 1), RequestCancelled("r2"), RequestCancelled("r2"))
    from cluster.ledger.events import HolderDied

    desk.tell(HolderDied("hr3"), HolderDied("hr3"))
    assert desk.tell(UnloadRequested("A")) == ["quiesce A#1"]
    assert desk.release("r4") == ["desire A 0"]


def test_regression_two_queued_models_of_which_one_never_loads() -> None:
    desk = Desk(*(model(name, slots=1) for name in "ABC"), bound_s=BOUND)
    desk.arrive("a1", "A")
    desk.boot("A", "A#1")
    desk.arrive("b1", "B")
    desk.arrive("c1", "C")
    served = []
    for _ in range(60):
        desk.at(desk.now + 1.0)
        for name in "ABC":
            replicas = [each.replica for each in desk.ledger.snapshot().replicas if each.model == name]
            if desk.ledger.desired[name] and None in replicas:
                desk.boot(name, f"{name}#{desk.now}")
            for uid in replicas:
                if uid and desk.state(uid) == "STOPPING":
                    desk.gone(uid)
        for request in list(desk.grants):
            served.append(request)
            desk.release(request)
            del desk.grants[request]
    assert sorted(served) == ["a1", "b1", "c1"]


def test_a_drain_begins_before_the_room_empties() -> None:
    """Overlapping streams on A for ever; B gets in all the same, and no stream is cut."""
    desk = Desk(model("A", slots=4), model("B"), bound_s=BOUND)
    desk.arrive("a0", "A")
    desk.boot("A", "A#1")
    desk.arrive("b1", "B", priority=1)
    number = 0
    while "b1" not in desk.grants:
        number += 1
        assert desk.now < BOUND[0] + 3.0, "b1 starves"
        desk.at(desk.now + 0.5)
        desk.arrive(f"a{number}", "A")
        if f"a{number - 1}" in desk.grants:
            desk.release(f"a{number - 1}")
        if desk.state("A#1") == "STOPPING":
            desk.gone("A#1")
            desk.boot("B", "B#1")


def test_manual_unload_waits_for_the_last_lease() -> None:
    desk = Desk(model("A", slots=1))
    desk.arrive("r1", "A")
    desk.boot("A", "A#1")
    desk.arrive("r2", "A")
    assert desk.tell(UnloadRequested("A")) == ["reject r2 ModelUnavailable", "quiesce A#1"]
    assert desk.arrive("r3", "A") == ["reject r3 ModelUnavailable"]
    assert desk.release("r1") == ["desire A 0"]
    assert desk.gone("A#1") == []
    assert desk.tell(UnloadRequested("A"), UnloadRequested("nobody")) == []


def test_scale_down_closes_the_newest_and_older_ones_wait_behind_it() -> None:
    """Serve stops a model's newest replica first, so an empty older one may not be counted out before it."""
    spec = model("A", slots=1, max_replicas=2)
    desk = Desk(spec, gpus=2)
    desk.arrive("r1", "A")
    desk.boot("A", "A#1")
    assert desk.arrive("r2", "A") == ["desire A 2"]
    desk.boot("A", "A#2")
    assert desk.tell(UnloadRequested("A")) == ["quiesce A#1", "quiesce A#2"]
    assert desk.release("r1") == []
    assert desk.state("A#1") == "DRAINING"
    assert desk.release("r2") == ["desire A 0"]


def test_config_change_drains_what_is_out_of_date_only() -> None:
    desk = Desk(model("A"), model("B"), gpus=2)
    desk.arrive("a1", "A")
    desk.boot("A", "A#1")
    desk.arrive("b1", "B")
    desk.boot("B", "B#1")
    spec = replace(desk.spec, models={"A": model("A", revision="2"), "B": desk.spec.models["B"]})
    assert desk.tell(ConfigChanged(spec)) == ["quiesce A#1"]
    desk.arrive("a2", "A")
    assert desk.release("a1") == ["desire A 0"]
    assert desk.gone("A#1") == ["desire A 1"]
    assert desk.boot("A", "A#2") == ["grant a2 A#2"]


def test_fewer_replicas_allowed_drain_the_newest() -> None:
    desk = Desk(model("A", min_replicas=2, max_replicas=2), gpus=2)
    assert desk.at(0.0) == ["desire A 2"]
    desk.boot("A", "A#1")
    desk.tell(ReplicaStarted("A", "A#2", "n"))
    spec = replace(desk.spec, models={"A": model("A", max_replicas=1)})
    assert desk.tell(ConfigChanged(spec)) == ["desire A 1"]
    assert desk.state("A#2") == "STOPPING"


def test_removed_model_goes_when_its_last_lease_has() -> None:
    desk = Desk(model("A"), model("B"))
    desk.arrive("a1", "A")
    desk.boot("A", "A#1")
    desk.arrive("a2", "A")
    spec = replace(desk.spec, models={"B": model("B")})
    assert desk.tell(ConfigChanged(spec)) == ["reject a2 ModelNotFound", "quiesce A#1"]
    assert desk.arrive("a3", "A") == ["reject a3 ModelNotFound"]
    assert desk.release("a1") == ["desire A 0"]
    assert "A" in desk.ledger.desired
    assert desk.gone("A#1") == []
    assert "A" not in desk.ledger.desired
    assert desk.arrive("a4", "A") == ["reject a4 ModelNotFound"]
    assert desk.extras() == {"available_models": ["B"]}


def test_removed_model_that_comes_back_is_itself_again() -> None:
    desk = Desk(model("A"))
    desk.arrive("a1", "A")
    desk.boot("A", "A#1")
    desk.tell(ConfigChanged(replace(desk.spec, models={})))
    assert desk.arrive("a2", "A") == ["reject a2 ModelNotFound"]
    desk.tell(ConfigChanged(desk.spec))
    assert desk.arrive("a3", "A") == ["reopen A#1"]
    assert desk.release("a1") == ["grant a3 A#1"]


def test_node_that_leaves_is_drained() -> None:
    desk = Desk(model("A", max_replicas=2), nodes={"n": NodeSpec("n", gpus=1), "m": NodeSpec("m", gpus=1)})
    desk.arrive("a1", "A")
    desk.boot("A", "A#1", "m")
    assert desk.tell(NodesChanged({"n": NodeSpec("n", gpus=1)})) == ["quiesce A#1"]
    assert desk.arrive("a2", "A") == ["desire A 2"], "nobody waits for a node that is lost"
    assert desk.boot("A", "A#2", "n") == ["grant a2 A#2"]
    assert desk.release("a1") == [], "Serve may stop the other one first"
    assert desk.gone("A#1") == ["desire A 1"]
    assert list(desk.ledger._pool.book.nodes) == ["n"]


def test_a_drain_has_a_deadline_too() -> None:
    desk = Desk(model("A", slots=2), model("B"), bound_s=BOUND, load_prior_s=0.0, drain_timeout_s=100.0)
    desk.arrive("a1", "A", priority=1)
    desk.boot("A", "A#1")
    desk.arrive("b1", "B", priority=1)
    desk.at(5.0)
    assert desk.ledger.next_deadline() == 105.0
    assert desk.at(104.9) == []
    assert desk.at(105.0) == ["desire A 0"]
    assert desk.release("a1") == []


def test_failure_of_a_draining_replica() -> None:
    desk = contended()
    assert desk.tell(ReplicaFailed("A#1", "broken")) == ["desire A 0"]
    assert desk.tell(ReplicaFailed("A#1", "broken"), ReplicaFailed("nobody", "?")) == []
    assert desk.gone("A#1") == ["desire B 1"]


def test_pinned_is_never_a_victim() -> None:
    desk = Desk(model("A", pinned=True), model("B"), bound_s=BOUND)
    desk.warm("A", "A#1")
    desk.arrive("b1", "B", priority=1, timeout=500.0)
    assert desk.at(100.0) == []
    assert desk.at(500.0) == ["reject b1 BackendTimeout"]
    assert desk.extras() == {"phase": "queued"}
    assert desk.at(10_000.0) == [], "and never idle"


@pytest.mark.parametrize(("arrived", "early", "drains"), [(150.0, 199.0, 201.0), (300.0, 301.0, 308.0)])
def test_a_pin_by_request_gives_way_to_a_bound_in_the_end(arrived: float, early: float, drains: float) -> None:
    """Not before `max_keep_alive_s` has passed since its last request, and not before the bound has come."""
    desk = Desk(model("A"), model("B"), bound_s=BOUND, load_prior_s=0.0, max_keep_alive_s=200.0)
    desk.warm("A", "A#1")
    desk.arrive("a1", "A", keep_alive=-1)
    desk.release("a1")
    assert desk.at(arrived) == []
    desk.arrive("b1", "B", timeout=500.0)
    assert desk.at(early) == []
    assert desk.at(drains) == ["quiesce A#1", "desire A 0"]


def test_a_pin_by_request_ends_with_the_next_unload() -> None:
    desk = Desk(model("A", idle_timeout_s=10.0), model("B"))
    desk.warm("A", "A#1")
    desk.arrive("a1", "A", keep_alive=-1)
    desk.release("a1")
    assert desk.tell(UnloadRequested("A")) == ["quiesce A#1", "desire A 0"]
    desk.gone("A#1")
    desk.tell(LoadRequested("A", 1))
    assert desk.boot("A", "A#2") == []
    assert desk.ledger.snapshot().models["A"].pinned is False
    assert desk.at(desk.now + 10.0) == ["quiesce A#2", "desire A 0"]


def test_waiter_takes_back_a_drain_that_nobody_counts_on() -> None:
    """A surplus replica drains when its model is wanted again."""
    desk = Desk(model("A", slots=1, max_replicas=2, idle_timeout_s=10.0), gpus=2)
    for request in ("r1", "r2"):
        desk.arrive(request, "A")
    desk.boot("A", "A#1")
    desk.boot("A", "A#2")
    desk.release("r1")
    # A#1 was idle, but Serve would stop A#2; so A#1 stays in its stead.
    assert desk.at(10.0) == ["quiesce A#2"]
    assert desk.arrive("r3", "A") == ["grant r3 A#1"]
    assert desk.arrive("r4", "A") == ["reopen A#2"]
    assert desk.release("r2") == ["grant r4 A#2"]
