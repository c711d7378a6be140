"""A client that will not wait for a load is told at once, as soon as that load is certain to take longer."""

from __future__ import annotations

from dataclasses import replace

from cluster.ledger.events import (
    ConfigChanged,
    EngineUnloaded,
    ReplicaReady,
    ReplicaStarted,
    ServerManifest,
    UnloadRequested,
)
from cluster.ledger.specs import ServerSpec
from tests.unit.ledger.desk import Desk, model

# Two loads of A took so long, so none is taken to last less than half of it.
LOAD_S = 20.0
CERTAIN_S = 10.0


def load(desk: Desk, seconds: float) -> None:
    """A is asked for, loads for so long, and is unloaded."""
    desk.arrive(f"first-{desk.now}", "A")
    if desk.state("A#1") is None:
        desk.tell(ReplicaStarted("A", "A#1", "n"))
    desk.now += seconds
    desk.tell(ReplicaReady("A#1"))
    desk.release(f"first-{desk.now - seconds}")
    desk.tell(UnloadRequested("A"))
    desk.tell(EngineUnloaded("A#1"))


def known(loads: int = 2, **more: object) -> Desk:
    desk = Desk(model("A", **more), model("B", slots=4), max_asleep=None)
    for index in range(loads):
        load(desk, LOAD_S + index)
    return desk


def test_who_will_not_wait_for_the_load_is_told_when_it_begins_and_it_goes_on() -> None:
    desk = known()
    assert desk.arrive("a1", "A", timeout=CERTAIN_S) == ["reject a1 QueueFull"]
    assert desk.extras()["retry_after"] == 20.0
    assert (desk.state("A#1"), len(desk.loads)) == ("LOADING", 3)
    desk.now += 4.0
    assert desk.arrive("a2", "A", timeout=6.0) == ["reject a2 QueueFull"]
    assert desk.extras()["expected_wait_s"] == round(desk.ledger.expected_wait_s("A", 2, desk.now) or 0.0, 1)
    assert desk.arrive("a3", "A", timeout=6.1) == [], "nobody can be certain of that"
    desk.now += 6.05
    assert desk.tell(ReplicaReady("A#1")) == ["grant a3 A#1"]


def test_without_two_loads_nothing_is_certain() -> None:
    assert known(1).arrive("a1", "A", timeout=1.0) == []


def test_another_configuration_may_load_faster() -> None:
    desk = known()
    changed = {**desk.spec.models, "A": model("A", revision="small")}
    desk.tell(ConfigChanged(replace(desk.spec, models=changed)))
    assert desk.arrive("a1", "A", timeout=1.0) == []


def test_who_waits_for_a_place_has_the_model_loaded() -> None:
    """His wait drains the other model, so it is of use, and the load is there for those who ask again."""
    desk = known()
    desk.arrive("b1", "B")
    desk.tell(ReplicaStarted("B", "B#1", "n"), ReplicaReady("B#1"))
    assert desk.arrive("a1", "A", timeout=5.0) == ["quiesce B#1"]
    desk.now += 1.0
    assert desk.release("b1") == ["unload B#1"]
    assert desk.arrive("a2", "A") == []
    desk.now += 1.0
    assert desk.tell(EngineUnloaded("B#1")) == ["reject a1 QueueFull"]
    assert desk.state("A#1") == "LOADING"


def test_a_fallback_takes_who_will_not_wait() -> None:
    desk = known(fallbacks=("B",))
    assert desk.arrive("a1", "A", timeout=5.0) == []
    assert desk.ledger.snapshot().models["B"].queued == 1
    assert desk.arrive("a2", "A", timeout=5.0) == []
    assert desk.ledger.snapshot().models["B"].queued == 2


def test_a_server_may_serve_him_any_moment() -> None:
    desk = known()
    desk.tell(ConfigChanged(replace(desk.spec, servers=(ServerSpec("http://one", 1),))))
    desk.tell(ServerManifest("http://one", ("A",)))
    assert desk.arrive("s1", "A") == ["grant s1 http://one"]
    assert desk.arrive("a1", "A", timeout=5.0) == []


def test_of_a_load_that_a_former_life_ordered_nothing_is_known() -> None:
    desk = known()
    desk.tell(ReplicaStarted("A", "A#2", "n", 2.0, loading=True))
    assert desk.arrive("a1", "A", timeout=5.0) == []
