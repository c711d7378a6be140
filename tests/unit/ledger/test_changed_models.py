"""A model's configuration changes while streams run on it: they go on, and nobody waits for them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.ledger.events import ConfigChanged, EngineUnloaded, NodesChanged, ReplicaReady, ReplicaStarted
from cluster.ledger.specs import NodeSpec
from tests.unit.ledger.desk import Desk, model

ROOM = 4


def changed(desk: Desk, revision: str) -> list[str]:
    """The model's engine is configured anew."""
    return desk.tell(ConfigChanged(replace(desk.spec, models={"A": replace(desk.spec.models["A"], revision=revision)})))


def streaming(max_asleep: int | None = 0, gpus: int = ROOM) -> Desk:
    """A serves one long stream, and its configuration has changed."""
    desk = Desk(model("A"), gpus=gpus, max_asleep=max_asleep)
    desk.arrive("long", "A")
    desk.boot("A", "A#1")
    assert changed(desk, "2") == ["quiesce A#1"]
    return desk


@pytest.mark.parametrize("max_asleep", [0, None])
def test_a_changed_model_is_loaded_beside_its_last_stream(max_asleep: int | None) -> None:
    desk = streaming(max_asleep)
    assert desk.arrive("a1", "A") == ["desire A 2"]
    desk.tell(ReplicaStarted("A", "A#2", "n", 2.0))
    assert desk.loads[-1].devices == (1,)
    assert desk.boot("A", "A#2") == ["grant a1 A#2"]
    assert desk.state("A#1") == "DRAINING"


def test_where_there_is_no_room_it_waits_for_that_stream() -> None:
    desk = streaming(gpus=1)
    assert desk.arrive("a1", "A") == []
    assert desk.release("long") == ["desire A 0"]
    assert desk.gone("A#1") == ["desire A 1"]


def test_what_has_drained_waits_for_the_one_that_serve_would_stop_first_and_is_the_only_one() -> None:
    desk = streaming()
    desk.arrive("a1", "A")
    desk.tell(ReplicaStarted("A", "A#2", "n", 2.0))
    desk.boot("A", "A#2")
    assert desk.release("long") == [], "Serve would stop the newer one, which streams"
    assert changed(desk, "3") == ["quiesce A#2"]
    assert desk.arrive("a2", "A") == [], "with each change one more would be left behind"
    assert desk.release("a1") == ["desire A 0"]
    desk.gone("A#2")
    assert desk.gone("A#1") == ["desire A 1"]


def test_where_replicas_stay_the_old_one_sleeps_on_and_loads_the_next_change() -> None:
    desk = streaming(None)
    desk.arrive("a1", "A")
    desk.tell(ReplicaStarted("A", "A#2", "n", 2.0))
    desk.boot("A", "A#2")
    assert desk.release("long") == ["unload A#1"]
    assert desk.tell(EngineUnloaded("A#1")) == []
    assert (desk.state("A#1"), desk.ledger.desired) == ("ASLEEP", {"A": 2})
    assert changed(desk, "3") == ["quiesce A#2"]
    desk.loads.clear()
    assert desk.arrive("a2", "A") == []
    assert [each.replica for each in desk.loads] == ["A#1"]


def test_who_drains_for_another_model_is_not_loaded_anew_beside_it() -> None:
    desk = Desk(model("A"), model("B"), bound_s=(1.0, 1.0, 1.0), load_prior_s=0.0, turn_swaps=0.0)
    desk.arrive("long", "A")
    desk.boot("A", "A#1")
    assert desk.arrive("b1", "B") == []
    desk.at(5.0)
    assert desk.state("A#1") == "DRAINING"
    desk.tell(ConfigChanged(replace(desk.spec, models={**desk.spec.models, "A": model("A", revision="2")})))
    desk.tell(NodesChanged({"n": NodeSpec("n", gpus=1)}))
    assert desk.arrive("a1", "A") == []
    assert desk.release("long") == ["desire A 0"]
    assert desk.gone("A#1") == ["desire B 1"]


def test_a_model_on_a_node_that_left_is_loaded_on_another() -> None:
    nodes = {"n": NodeSpec("n", gpus=1), "m": NodeSpec("m", gpus=1)}
    desk = Desk(model("A"), nodes=nodes, max_asleep=None)
    desk.arrive("long", "A")
    desk.boot("A", "A#1", "n")
    assert desk.tell(NodesChanged({"m": nodes["m"]})) == ["quiesce A#1"]
    assert desk.arrive("a1", "A") == ["desire A 2"]
    desk.tell(ReplicaStarted("A", "A#2", "m", 2.0))
    assert desk.boot("A", "A#2", "m") == ["grant a1 A#2"]


def test_what_only_loads_anew_needs_no_other_process() -> None:
    """A former life had it load by the configuration of that time; its waiter is served where it is."""
    desk = Desk(model("A"), gpus=1, max_asleep=None, recovering_until=1.0)
    desk.tell(ReplicaStarted("A", "A#1", "n", 1.0, loading=True, devices=(0,)))
    desk.arrive("r1", "A")
    desk.at(1.0)
    assert desk.tell(ReplicaReady("A#1", revision="old")) == ["quiesce A#1", "unload A#1"]
    assert desk.tell(EngineUnloaded("A#1")) == []
    assert [each.replica for each in desk.loads] == ["A#1"]
