"""Requests that run several sequences: so many slots of one replica at once, and nobody is overtaken for it."""

from __future__ import annotations

import pytest

from cluster.ledger.events import (
    ConfigChanged,
    LeaseReannounced,
    ReplicaFailed,
    ReplicaReady,
    ReplicaStarted,
    RequestArrived,
    RequestCancelled,
    ServerManifest,
)
from cluster.ledger.specs import PoolSpec, ServerSpec
from tests.unit.ledger import server_desk
from tests.unit.ledger.desk import Desk, model


def ready(slots: int = 4, **more: object) -> Desk:
    desk = Desk(model("a", slots=slots, **more))
    desk.warm("a", "u")
    return desk


def held(desk: Desk) -> dict[str, tuple[int, ...]]:
    return {each.request: each.slots for each in desk.ledger._pool.leases.values()}


def test_a_wide_request_gets_its_slots_at_once_and_gives_all_of_them_back() -> None:
    desk = ready()
    assert desk.arrive("w", "a", slots=3) == ["grant w u"]
    assert len(desk.grants["w"].slots) == len(set(desk.grants["w"].slots)) == 3
    assert desk.arrive("r1", "a") == ["grant r1 u"]
    assert desk.arrive("r2", "a") == []
    assert desk.release("w") == ["grant r2 u"]
    assert desk.arrive("w2", "a", slots=2) == ["grant w2 u"]


def test_more_than_a_replica_has_is_all_that_it_has() -> None:
    desk = ready()
    desk.arrive("w", "a", slots=100)
    assert sorted(desk.grants["w"].slots) == [0, 1, 2, 3]
    assert desk.arrive("r1", "a") == []
    assert desk.release("w") == ["grant r1 u"]


def test_a_wide_head_waits_before_free_slots_and_is_not_overtaken() -> None:
    desk = ready()
    for each in ("r1", "r2", "r3"):
        desk.arrive(each, "a")
    assert desk.arrive("w", "a", slots=3) == []
    assert desk.arrive("r4", "a") == [], "one slot is free, and belongs to who came before"
    assert desk.release("r1") == []
    assert desk.release("r2") == ["grant w u"]
    assert desk.release("r3") == ["grant r4 u"]


def test_a_higher_class_goes_before_a_wide_head() -> None:
    desk = ready()
    for each in ("r1", "r2", "r3"):
        desk.arrive(each, "a")
    desk.arrive("w", "a", slots=2, priority=3)
    assert desk.arrive("r4", "a", priority=1) == ["grant r4 u"]


def test_when_the_wide_head_leaves_those_behind_it_are_served() -> None:
    desk = ready()
    for each in ("r1", "r2", "r3"):
        desk.arrive(each, "a")
    desk.arrive("w", "a", slots=2)
    desk.arrive("r4", "a")
    assert desk.tell(RequestCancelled("w")) == ["grant r4 u"]


def test_when_the_wide_head_times_out_those_behind_it_are_served() -> None:
    desk = ready()
    for each in ("r1", "r2", "r3"):
        desk.arrive(each, "a")
    desk.arrive("w", "a", slots=2, timeout=5.0)
    desk.arrive("r4", "a")
    assert desk.at(5.0) == ["reject w BackendTimeout", "grant r4 u"]


def test_slots_for_slots_are_handed_over() -> None:
    desk = ready()
    desk.arrive("w1", "a", slots=4)
    desk.arrive("w2", "a", slots=9, priority=1)
    assert desk.release("w1") == ["grant w2 u"]
    assert desk.ledger._pool.models["a"].by_priority == [4, 0, 0]


def test_one_wide_lease_makes_room_for_several() -> None:
    desk = ready()
    desk.arrive("w", "a", slots=4)
    for each in ("r1", "r2", "r3"):
        desk.arrive(each, "a")
    assert desk.release("w") == ["grant r1 u", "grant r2 u", "grant r3 u"]


def test_the_slots_of_a_wide_lease_are_of_one_replica() -> None:
    desk = Desk(model("a", slots=2, max_replicas=2), gpus=2)
    desk.warm("a", "u")
    desk.arrive("x1", "a")
    desk.arrive("x2", "a")
    desk.arrive("x3", "a")
    desk.at(5.0)
    assert desk.boot("a", "v") == ["grant x3 v"]
    desk.release("x1")
    # A slot here and a slot there are not two slots.
    assert desk.arrive("w", "a", slots=2) == []
    assert desk.release("x3") == ["grant w v"]


def test_a_wide_waiter_asks_for_one_more_replica_as_others_do() -> None:
    desk = Desk(model("a", slots=4, max_replicas=2), gpus=2)
    desk.warm("a", "u")
    desk.arrive("r1", "a")
    assert desk.arrive("w", "a", slots=4) == []
    assert desk.at(2.0) == ["desire a 2"]
    assert desk.boot("a", "v") == ["grant w v"]


def test_replicas_of_an_older_configuration_may_have_fewer_slots() -> None:
    desk = Desk(model("a", slots=2, max_replicas=2, min_replicas=2), gpus=2)
    desk.at(0.0)
    desk.boot("a", "u")
    desk.boot("a", "v")
    spec = PoolSpec(models={"a": model("a", slots=4, max_replicas=2)}, nodes=desk.spec.nodes)
    desk.arrive("r1", "a")
    desk.arrive("r2", "a")
    desk.tell(ConfigChanged(spec))
    assert desk.arrive("w", "a", slots=4) == []


def test_a_fallback_gives_as_many_slots() -> None:
    desk = Desk(model("a", fallbacks=("b",)), model("b", slots=4), gpus=2)
    desk.warm("b", "v")
    desk.arrive("w", "a", slots=3)
    desk.tell(ReplicaStarted("a", "u", "n"))
    assert desk.tell(ReplicaFailed("u", "no")) == ["grant w v", "desire a 0"]
    assert len(held(desk)["w"]) == 3


def test_a_wide_lease_of_a_former_life_takes_its_slots_again() -> None:
    desk = Desk(model("a", slots=4), recovering_until=2.0)
    desk.boot("a", "u")
    desk.tell(LeaseReannounced("w", "h", "a", "u", 7, slots=3))
    desk.tell(RequestArrived("r1", "h", "a", 2, 50.0), RequestArrived("r2", "h", "a", 2, 50.0))
    assert desk.at(2.0) == ["grant r1 u", "desire a 1"]
    assert len(held(desk)["w"]) == 3


def test_a_wide_lease_that_has_outgrown_its_replica_keeps_what_there_is() -> None:
    desk = Desk(model("a", slots=2), recovering_until=2.0)
    desk.boot("a", "u")
    desk.tell(LeaseReannounced("w", "h", "a", "u", 7, slots=4))
    assert len(held(desk)["w"]) == 2


@pytest.mark.parametrize("slots", [0, -1, 1.5, "2", None])
def test_malformed_widths_are_ignored(slots: object) -> None:
    desk = ready()
    assert desk.tell(RequestArrived("w", "h", "a", 2, 50.0, None, slots)) == []  # type: ignore[arg-type]
    assert desk.tell(LeaseReannounced("w", "h", "a", "u", 7, 2, slots)) == []  # type: ignore[arg-type]
    assert held(desk) == {}


def test_a_server_takes_a_wide_request_as_one() -> None:
    desk = server_desk.Desk(ServerSpec(server_desk.ONE, 2))
    desk.post(ServerManifest(server_desk.ONE, ("m",)))
    desk.post(RequestArrived("w", "h", "m", 2, 100.0, None, 8))
    assert len(desk.held["w"].slots) == 1
    assert desk.server().active_requests == 1


def test_the_widest_of_many_does_not_starve() -> None:
    """Narrow ones keep coming; the wide one is served when those before it have ended."""
    desk = ready()
    for index in range(4):
        desk.arrive(f"r{index}", "a")
    desk.arrive("w", "a", slots=4)
    served: list[str] = []
    for index in range(4):
        desk.now += 1.0
        assert desk.arrive(f"n{index}", "a") == []
        served += desk.release(f"r{index}")
    assert served == ["grant w u"]


def test_a_load_in_place_serves_the_wide_one_that_waits() -> None:
    desk = Desk(model("a", slots=4))
    desk.arrive("w", "a", slots=4)
    desk.tell(ReplicaStarted("a", "u", "n"))
    assert desk.tell(ReplicaReady("u")) == ["grant w u"]


def test_who_comes_after_a_wide_one_finds_the_slots_that_were_free_before() -> None:
    """Two slots are free and too few for the first in line; it gets those that are given back, the next one those."""
    desk = ready(slots=8)
    desk.arrive("w1", "a", slots=3)
    desk.arrive("w2", "a", slots=3)
    desk.arrive("w3", "a", slots=3)
    assert desk.arrive("r1", "a") == []
    assert desk.release("w1") == ["grant w3 u", "grant r1 u"]


def test_a_wide_head_that_waits_does_not_keep_the_tree_going() -> None:
    desk = ready()
    for each in ("r1", "r2", "r3"):
        desk.arrive(each, "a")
    desk.arrive("w", "a", slots=2)
    desk.at(1.0)
    assert not desk.ledger._pool.undecided
    assert not desk.ledger._pool.touched
