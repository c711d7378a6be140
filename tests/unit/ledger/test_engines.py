"""The life of an engine inside a replica: ordered to load, suspected, dead, loaded again in place."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.ledger.events import (
    ConfigChanged,
    EngineAsleep,
    EngineDied,
    EngineUnloaded,
    LoadEngine,
    LoadRequested,
    ReplicaFailed,
    ReplicaGone,
    ReplicaReady,
    ReplicaStarted,
    ReplicaSuspected,
    RequestArrived,
    Ticked,
    UnloadRequested,
)
from cluster.ledger.ledger import Ledger
from cluster.ledger.specs import ModelSpec, NodeSpec, PoolSpec
from tests.unit.ledger.desk import Desk, model

BOUND = (5.0, 8.0, 12.0)


def serving(**more: object) -> Desk:
    """One replica with one lease of `r1`, and no order to load any more."""
    desk = Desk(model("a", slots=2, **more), gpus=2)
    desk.arrive("r1", "a")
    assert desk.boot("a", "u") == ["grant r1 u"]
    desk.loads.clear()
    return desk


# --- orders to load ---------------------------------------------------------------------------------------------------


def test_the_order_to_load_carries_the_devices_of_the_place() -> None:
    desk = Desk(model("a", num_gpus=2.0), gpus=3)
    desk.arrive("r1", "a")
    desk.tell(ReplicaStarted("a", "u", "n"))
    assert desk.loads == [LoadEngine("u", "a", (0, 1))]
    desk.tell(ReplicaStarted("a", "u", "n"), ReplicaReady("u"))
    assert len(desk.loads) == 1


def test_one_that_loads_already_gets_no_order() -> None:
    desk = Desk(model("a"))
    desk.arrive("r1", "a")
    desk.tell(ReplicaStarted("a", "u", "n", loading=True))
    assert desk.loads == []


def test_one_that_nobody_asked_for_loads_if_it_is_kept() -> None:
    desk = Desk(model("a"))
    desk.tell(ReplicaStarted("a", "u", "n"))
    assert [each.replica for each in desk.loads] == ["u"]
    desk.tell(ReplicaStarted("a", "v", "n"))
    assert (desk.state("v"), len(desk.loads)) == ("STOPPING", 1)


def test_the_load_timeout_counts_from_the_order() -> None:
    desk = Desk(model("a", load_timeout_s=10.0))
    desk.arrive("r1", "a")
    desk.at(9.0)
    desk.tell(ReplicaStarted("a", "u", "n"))
    assert desk.at(18.9) == []
    assert desk.at(19.0) == ["reject r1 BackendTimeout", "desire a 0"]


def test_a_start_without_a_process_is_given_up_as_before() -> None:
    desk = Desk(model("a", load_timeout_s=10.0))
    desk.arrive("r1", "a")
    assert "reject r1 BackendTimeout" in desk.at(10.0)
    assert desk.ledger.snapshot().replicas == ()


def test_a_restarted_ledger_orders_no_second_load() -> None:
    desk = Desk(model("a"), model("b"), model("c"), gpus=3, recovering_until=2.0)
    desk.tell(ReplicaStarted("a", "u", "n", 1.0, loading=True))
    desk.tell(ReplicaStarted("b", "v", "n", 1.0), ReplicaReady("v"))
    desk.tell(ReplicaStarted("c", "w", "n", 1.0))
    assert desk.loads == [], "nothing is decided yet"
    desk.at(2.0)
    assert [each.replica for each in desk.loads] == ["w"]


def test_the_address_of_an_engine_goes_into_its_grants() -> None:
    desk = Desk(model("a"))
    desk.arrive("r1", "a")
    desk.tell(ReplicaStarted("a", "u", "n"), ReplicaReady("u", address=("unix", "/run/u")))
    assert desk.grants["r1"].address == ("unix", "/run/u")


def test_word_that_came_before_the_replica_is_kept_whole() -> None:
    desk = Desk(model("a"))
    desk.arrive("r1", "a")
    desk.tell(ReplicaReady("u", 7, "there", ("0",)), ReplicaStarted("a", "u", "n"))
    assert desk.grants["r1"].address == "there"
    assert desk.ledger._pool.replicas["u"].devices == ("0",)


# --- engines that hang ------------------------------------------------------------------------------------------------


def test_an_engine_that_hangs_is_restarted_once() -> None:
    desk = Desk(model("a"))
    desk.arrive("r1", "a")
    desk.tell(ReplicaStarted("a", "u", "n"))
    assert desk.tell(ReplicaSuspected("u")) == []
    desk.tell(ReplicaReady("u"))
    assert desk.tell(ReplicaSuspected("u"), ReplicaSuspected("u")) == ["restart u"]
    assert desk.tell(ReplicaSuspected("nobody")) == []


def test_after_its_death_it_may_be_suspected_again() -> None:
    desk = serving()
    desk.tell(ReplicaSuspected("u"), EngineDied("u", "killed"), ReplicaReady("u"))
    assert desk.tell(ReplicaSuspected("u")) == ["restart u"]


def test_one_that_answered_may_be_suspected_again() -> None:
    desk = serving()
    desk.tell(ReplicaSuspected("u"), ReplicaReady("u"))
    assert desk.tell(ReplicaSuspected("u")) == ["restart u"]


def test_one_that_drains_can_hang_too() -> None:
    desk = serving()
    desk.tell(UnloadRequested("a"))
    assert desk.tell(ReplicaSuspected("u")) == ["restart u"]


# --- engines that die -------------------------------------------------------------------------------------------------


def test_a_dead_engine_loads_again_in_place_and_its_waiters_stay() -> None:
    desk = serving()
    desk.arrive("r2", "a")
    assert desk.arrive("r3", "a") == []
    assert desk.tell(EngineDied("u", "signal 11")) == []
    assert desk.state("u") == "LOADING"
    assert desk.loads == [LoadEngine("u", "a", (0,))], "on the same devices, at once"
    assert desk.ledger.snapshot().leases == 0
    assert desk.ledger.queue_position("r3") == ("loading", "a")
    assert desk.ledger.snapshot().models["a"].last_error == "signal 11"
    assert desk.tell(ReplicaReady("u", address="new")) == ["grant r3 u"]
    assert desk.grants["r3"].address == "new"
    assert desk.ledger.desired == {"a": 1}, "Serve heard nothing of all this"


def test_its_room_stays_taken_while_it_loads_again() -> None:
    desk = Desk(model("a"), model("b"))
    desk.warm("a", "u")
    desk.tell(EngineDied("u", "gone"))
    assert desk.arrive("b1", "b") == []
    desk.tell(ReplicaReady("u"))
    assert desk.out_words() == ["quiesce u", "desire a 0"]


def test_one_that_dies_again_soon_pauses_and_the_third_time_is_given_up() -> None:
    desk = serving()
    desk.tell(EngineDied("u", "one"))
    desk.tell(ReplicaReady("u"))
    desk.arrive("r2", "a")
    desk.tell(EngineDied("u", "two"))
    assert len(desk.loads) == 1, "not yet again"
    assert desk.at(0.9) == []
    desk.at(1.0)
    assert len(desk.loads) == 2
    desk.tell(ReplicaReady("u"))
    desk.arrive("r3", "a")
    assert desk.tell(EngineDied("u", "three")) == ["desire a 0"]
    assert desk.state("u") == "STOPPING"
    assert desk.arrive("r4", "a") == ["reject r4 ModelUnavailable"]
    assert desk.gone("u") == []


def test_one_that_served_for_long_is_forgiven() -> None:
    desk = serving(idle_timeout_s=0.0)
    for _ in range(5):
        desk.loads.clear()
        desk.tell(EngineDied("u", "again"))
        assert len(desk.loads) == 1
        desk.tell(ReplicaReady("u"))
        desk.at(desk.now + 60.0)


def test_an_engine_that_dies_while_it_loads_is_tried_again_in_place() -> None:
    desk = Desk(model("a"))
    desk.arrive("r1", "a")
    desk.tell(ReplicaStarted("a", "u", "n"), EngineDied("u", "one"))
    assert desk.state("u") == "LOADING"
    desk.at(1.0)
    assert len(desk.loads) == 2
    desk.tell(EngineDied("u", "two"))
    desk.at(3.0)
    assert len(desk.loads) == 3
    assert desk.tell(EngineDied("u", "three")) == ["reject r1 ModelUnavailable", "desire a 0"]
    assert desk.state("u") == "STOPPING"


def test_the_load_timeout_counts_anew_for_each_load() -> None:
    desk = Desk(model("a", load_timeout_s=10.0))
    desk.arrive("r1", "a")
    desk.tell(ReplicaStarted("a", "u", "n"))
    desk.at(9.5)
    desk.tell(EngineDied("u", "one"))
    desk.at(10.5)
    assert (desk.state("u"), len(desk.loads)) == ("LOADING", 2)
    desk.at(20.4)
    assert desk.state("u") == "LOADING"
    desk.at(20.5)
    assert desk.state("u") == "STOPPING"


def test_a_draining_one_whose_engine_died_goes_on_to_stop() -> None:
    desk = Desk(model("a"), model("b"), bound_s=BOUND, load_prior_s=0.0)
    desk.arrive("a1", "a", priority=1)
    desk.boot("a", "u")
    desk.arrive("b1", "b", priority=1)
    assert desk.at(5.0) == ["quiesce u"]
    assert desk.tell(EngineDied("u", "gone")) == ["desire a 0"]
    assert desk.state("u") == "STOPPING"
    assert desk.gone("u") == ["desire b 1"]


def test_a_draining_one_whose_engine_died_is_not_opened_again() -> None:
    """An older one waits for a newer one to run dry; meanwhile its engine died, and those for whom it drained left."""
    desk = Desk(model("a", max_replicas=2, min_replicas=2), gpus=2)
    desk.at(0.0)
    desk.boot("a", "u")
    desk.boot("a", "v")
    desk.arrive("r1", "a")
    desk.arrive("r2", "a")
    desk.tell(UnloadRequested("a"))
    assert (desk.state("u"), desk.state("v")) == ("DRAINING", "DRAINING")
    desk.tell(EngineDied("u", "gone"))
    assert desk.state("u") == "ASLEEP", "Serve would stop the newer one"
    desk.tell(LoadRequested("a", 2), ConfigChanged(desk.spec))
    desk.arrive("r3", "a")
    assert desk.state("u") == "ASLEEP"
    assert desk.release("r2") == ["desire a 0"]


def test_the_death_of_an_engine_that_is_leaving_or_unknown_is_ignored() -> None:
    desk = serving()
    desk.tell(EngineDied("nobody", "gone"))
    desk.tell(ReplicaFailed("u", "no"))
    assert desk.tell(EngineDied("u", "gone")) == []
    assert desk.state("u") == "STOPPING"


def test_what_nobody_ordered_of_an_engine_is_ignored() -> None:
    desk = serving()
    assert desk.tell(EngineUnloaded("u"), EngineAsleep("u", 1, 1), EngineAsleep("u", -1, 1)) == []
    assert desk.state("u") == "READY"


def test_an_end_that_a_former_life_ordered_is_the_end_of_what_was_announced() -> None:
    """The replica announced its engine to the new life, and only then did the old order reach it."""
    desk = Desk(model("a"), recovering_until=1.0)
    desk.tell(ReplicaStarted("a", "u", "n", loading=True), ReplicaReady("u"))
    desk.at(1.0)
    desk.arrive("r1", "a")
    desk.loads.clear()
    desk.tell(EngineUnloaded("u"))
    assert desk.state("u") == "LOADING"
    assert [each.replica for each in desk.loads] == ["u"]


def test_word_of_an_engine_that_died_before_its_replica_came_is_dropped() -> None:
    desk = Desk(model("a"))
    desk.arrive("r1", "a")
    desk.tell(ReplicaReady("u"), EngineDied("u", "gone"))
    assert desk.tell(ReplicaStarted("a", "u", "n")) == []
    assert desk.state("u") == "LOADING"


def test_what_changed_meanwhile_is_not_loaded_again() -> None:
    desk = serving()
    desk.tell(EngineDied("u", "one"))
    desk.loads.clear()
    changed = replace(desk.spec, models={"a": replace(desk.spec.models["a"], revision="2")})
    assert desk.tell(ConfigChanged(changed)) == ["desire a 0"]
    assert desk.state("u") == "STOPPING"
    assert desk.loads == []


def test_an_order_that_fails_takes_back_those_that_are_due_to_load() -> None:
    desk = Desk(model("a", max_replicas=2, load_timeout_s=5.0), gpus=2)
    desk.tell(LoadRequested("a", 2))
    assert desk.at(5.0) == ["desire a 0"]
    assert desk.ledger.snapshot().replicas == ()


def test_a_replica_that_dies_after_its_engine_is_gone() -> None:
    desk = serving()
    desk.tell(EngineDied("u", "one"), ReplicaGone("u"))
    assert desk.state("u") is None


# --- the age of replicas ----------------------------------------------------------------------------------------------


def test_after_a_restart_the_newest_is_drained_whatever_the_order_of_their_words() -> None:
    desk = Desk(model("a", max_replicas=2, idle_timeout_s=10.0), gpus=2, recovering_until=2.0)
    desk.tell(ReplicaStarted("a", "new", "n", 200.0), ReplicaReady("new"))
    desk.tell(ReplicaStarted("a", "old", "n", 100.0), ReplicaReady("old"))
    desk.at(2.0)
    assert "quiesce new" in desk.at(12.0)


@pytest.mark.parametrize("started_at", [float("nan"), float("inf"), "1"])
def test_a_malformed_age_is_ignored(started_at: object) -> None:
    desk = Desk(model("a"))
    desk.tell(ReplicaStarted("a", "u", "n", started_at))  # type: ignore[arg-type]
    assert desk.state("u") is None


@pytest.mark.parametrize("devices", [(-1,), ("0",), (1 << 20,), 1])
def test_malformed_devices_are_ignored(devices: object) -> None:
    desk = Desk(model("a"), gpus=1)
    desk.tell(ReplicaStarted("a", "u", "n", 1.0, True, devices))  # type: ignore[arg-type]
    assert not desk.ledger.snapshot().replicas


def test_a_restarted_ledger_learns_where_an_engine_is_being_loaded() -> None:
    """Or it would give the device of a load under way to the next model."""
    spec = PoolSpec(
        models={"A": ModelSpec("A", num_gpus=1.0), "B": ModelSpec("B", num_gpus=1.0)},
        nodes={"n": NodeSpec("n", gpus=2)},
    )
    ledger = Ledger(spec, epoch="e2", now=0.0, recovering_until=2.0)
    assert ledger.decide(ReplicaStarted("A", "a1", "n", 1.0, True, (1,)), 0.5) == []
    ledger.decide(RequestArrived("r", "h", "B", 2, 100.0), 1.0)
    ledger.decide(Ticked(), 2.5)
    assert ledger.decide(ReplicaStarted("B", "b1", "n", 3.0), 3.0) == [LoadEngine("b1", "B", (0,))]
    ledger.check()
