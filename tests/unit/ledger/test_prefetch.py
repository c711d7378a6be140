"""While a model waits for its victims, the files it will load are read: once, where it will stand, by who is there."""

from __future__ import annotations

from cluster.ledger.events import (
    EngineUnloaded,
    LoadRequested,
    PrefetchModel,
    ReplicaReady,
    ReplicaStarted,
    ReplicaSuspected,
)
from cluster.ledger.specs import NodeSpec
from tests.unit.ledger.desk import Desk, model

BOUNDS = (1.0, 1.0, 1.0)


def two(**more: object) -> Desk:
    """Model a is loaded in u, b sleeps in v, and there is one device for both."""
    pool = {"max_asleep": None, "bound_s": BOUNDS, "load_prior_s": 0.0, **more}
    desk = Desk(model("a", slots=2), model("b"), **pool)  # type: ignore[arg-type]
    desk.warm("b", "v")
    desk.arrive("first", "a")
    desk.tell(EngineUnloaded("v"), ReplicaStarted("a", "u", "n"), ReplicaReady("u"))
    desk.release("first")
    desk.at(100.0)
    desk.prefetches.clear()
    return desk


def test_a_sleepers_files_are_read_while_its_victim_drains_and_once_only() -> None:
    desk = two()
    desk.arrive("a1", "a")
    desk.arrive("a2", "a")
    assert desk.prefetches == [], "nobody waits for another model"
    desk.arrive("b1", "b", priority=1)
    assert desk.prefetches == [PrefetchModel("b", "v")]
    desk.arrive("b2", "b", priority=1)
    desk.at(130.0)
    desk.release("a1")
    desk.release("a2")
    desk.tell(EngineUnloaded("u"), ReplicaReady("v"))
    assert desk.prefetches == [PrefetchModel("b", "v")]
    desk.arrive("a3", "a")
    assert desk.release("b1") == ["grant b2 v"], "it is overdue as well, and came before"
    desk.at(131.0)
    assert desk.prefetches[1:] == [PrefetchModel("a", "u")]


def test_nothing_is_read_where_there_is_room() -> None:
    desk = Desk(model("a"), model("b"), gpus=2, max_asleep=None)
    desk.warm("a", "u")
    desk.warm("b", "v")
    assert desk.prefetches == []


def test_another_models_process_reads_where_there_is_none_of_its_own() -> None:
    desk = Desk(model("a"), model("b"), max_asleep=None, bound_s=BOUNDS, load_prior_s=0.0)
    desk.arrive("a1", "a")
    desk.boot("a", "u")
    desk.arrive("b1", "b", priority=1)
    assert desk.prefetches == [PrefetchModel("b", "u")]
    desk.tell(ReplicaStarted("b", "v", "n"))
    desk.at(30.0)
    assert len(desk.prefetches) == 1, "when its own process comes they are in memory"


def test_a_claim_that_moves_to_another_node_has_them_read_there_too() -> None:
    nodes = {name: NodeSpec(name, gpus=1, cpus=8.0) for name in ("n", "m")}
    desk = Desk(model("a"), model("b"), model("c"), nodes=nodes, max_asleep=None, bound_s=BOUNDS, load_prior_s=0.0)
    desk.arrive("a1", "a")
    desk.boot("a", "u", "n")
    desk.arrive("b1", "b")
    desk.boot("b", "v", "m")
    desk.arrive("c1", "c", priority=1)
    first = {"u": "n", "v": "m"}[desk.prefetches[0].replica]
    desk.release("b1" if first == "n" else "a1")
    assert [each.model for each in desk.prefetches] == ["c", "c"]
    assert {each.replica for each in desk.prefetches} == {"u", "v"}


def test_a_model_that_is_loaded_there_has_no_need() -> None:
    desk = Desk(model("a", slots=1, max_replicas=2), model("b"), gpus=2, max_asleep=0)
    desk.arrive("a1", "a")
    desk.boot("a", "u")
    desk.warm("b", "v")
    desk.tell(LoadRequested("a", 2))
    assert desk.state("v") == "STOPPING"
    assert desk.prefetches == []


def test_a_process_that_hangs_is_not_asked() -> None:
    desk = Desk(model("a"), model("b"), max_asleep=0, bound_s=BOUNDS, load_prior_s=0.0)
    desk.arrive("a1", "a")
    desk.boot("a", "u")
    desk.tell(ReplicaSuspected("u"))
    desk.arrive("b1", "b", priority=1)
    assert desk.prefetches == []
