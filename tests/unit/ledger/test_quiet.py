"""Processes are started ahead of any need, when nothing else happens, and only where replicas stay."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.ledger.events import (
    ConfigChanged,
    EngineUnloaded,
    HolderAnnounced,
    HolderDied,
    NodesChanged,
    ReplicaFailed,
    ReplicaReady,
    ReplicaStarted,
    RequestCancelled,
    UnloadRequested,
)
from cluster.ledger.specs import NodeSpec
from tests.unit.ledger.desk import Desk, model

HERE = HolderAnnounced("h", (), ())


def test_one_process_after_the_other_and_no_more_than_may_sleep() -> None:
    desk = Desk(*(model(name) for name in "abc"), max_asleep=2)
    assert desk.at(100.0) == [], "nobody is there who could ask"
    assert desk.tell(HERE) == []
    desk.now = 101.0
    assert desk.tell(HERE) == [], "it says so from time to time"
    assert desk.ledger.next_deadline() == 102.0
    assert desk.at(102.0) == ["desire a 1"]
    assert desk.at(110.0) == [], "one at a time"
    desk.tell(ReplicaStarted("a", "u", "n", host_mib=150))
    assert desk.at(112.0) == ["desire b 1"]
    desk.tell(ReplicaStarted("b", "v", "n"))
    assert desk.at(120.0) == []
    assert desk.ledger.next_deadline() is None, "there is nothing more to do"
    assert desk.loads == []
    desk.arrive("b1", "b")
    assert [each.replica for each in desk.loads] == ["v"], "its first load needs no new process"


def test_the_last_used_is_started_first() -> None:
    desk = Desk(*(model(name) for name in "abc"), max_asleep=None)
    desk.arrive("b1", "b")
    desk.tell(RequestCancelled("b1"))
    assert desk.ledger.desired["b"] == 0
    desk.tell(HERE)
    desk.at(70.0)
    assert [name for name, count in desk.ledger.desired.items() if count] == ["b"]


def test_nothing_is_started_beside_work() -> None:
    desk = Desk(model("a"), model("b"), max_asleep=None)
    desk.tell(HERE)
    desk.now = 1.0
    desk.arrive("a1", "a")
    assert desk.at(2.0) == [], "somebody waits"
    assert desk.boot("a", "u") == ["grant a1 u"]
    assert desk.at(4.0) == [], "somebody is served"
    desk.now = 5.0
    desk.release("a1")
    assert desk.at(6.0) == ["desire b 1"]


def test_a_request_puts_it_off() -> None:
    desk = Desk(model("a"), model("b"), max_asleep=None)
    desk.warm("a", "u")
    desk.tell(HERE)
    desk.now = 1.0
    desk.arrive("a1", "a")
    desk.release("a1")
    assert desk.at(2.0) == []
    assert desk.at(4.0) == ["desire b 1"]


def test_replicas_that_end_with_their_engines_are_not_started_ahead() -> None:
    desk = Desk(model("a"), max_asleep=0)
    desk.tell(HERE)
    assert desk.ledger.next_deadline() is None
    assert desk.at(100.0) == []


def test_nobody_is_left_who_could_ask() -> None:
    desk = Desk(model("a"), max_asleep=None)
    desk.tell(HERE, HolderDied("h"))
    assert desk.at(100.0) == []


def test_a_host_without_room_gets_no_more() -> None:
    nodes = {"n": NodeSpec("n", gpus=1, cpus=8.0, host_memory_mib=4 * 300)}
    desk = Desk(model("a"), model("b"), nodes=nodes, max_asleep=None)
    desk.tell(HERE)
    assert desk.at(2.0) == ["desire a 1"]
    desk.tell(ReplicaStarted("a", "u", "n", host_mib=200))
    assert desk.at(50.0) == []
    more = {"n": replace(nodes["n"], host_memory_mib=4 * 400)}
    desk.tell(NodesChanged(more))
    assert desk.at(52.0) == ["desire b 1"]


@pytest.mark.parametrize("why", ["too large", "unloaded", "removed", "failed"])
def test_what_could_not_load_is_not_started(why: str) -> None:
    desk = Desk(model("a", num_gpus=9.0 if why == "too large" else 1.0), max_asleep=None)
    if why == "unloaded":
        desk.tell(UnloadRequested("a"))
    elif why == "removed":
        desk.tell(ConfigChanged(replace(desk.spec, models={})))
    elif why == "failed":
        desk.arrive("a1", "a")
        desk.tell(ReplicaStarted("a", "u", "n"), ReplicaFailed("u", "no such file"))
        desk.gone("u")
    desk.tell(HERE)
    assert desk.at(500.0) == []


def test_one_that_vanished_is_not_started_again_at_once() -> None:
    desk = Desk(model("a"), max_asleep=None)
    desk.tell(HERE)
    desk.at(2.0)
    desk.tell(ReplicaStarted("a", "u", "n"))
    assert desk.gone("u") == ["desire a 0"]
    assert desk.at(30.0) == []
    desk.now = 62.0
    desk.tell(ConfigChanged(desk.spec))
    assert desk.at(64.0) == ["desire a 1"]


def test_one_that_slept_too_long_has_to_be_wanted_first() -> None:
    desk = Desk(model("a", sleep_timeout_s=10.0), model("b"), max_asleep=None)
    desk.warm("a", "u")
    desk.arrive("b1", "b")
    desk.tell(EngineUnloaded("u"))
    desk.boot("b", "v")
    desk.release("b1")
    assert desk.at(10.0) == ["desire a 0"]
    desk.gone("u")
    desk.tell(HERE)
    assert desk.at(500.0)[-1:] != ["desire a 1"]
    assert desk.ledger.desired["a"] == 0
    desk.arrive("a1", "a")
    assert desk.ledger.desired["a"] == 1


def test_a_new_life_of_the_ledger_waits_for_its_window() -> None:
    desk = Desk(model("a"), max_asleep=None, recovering_until=2.0)
    desk.tell(HERE)
    assert desk.ledger.next_deadline() == 2.0
    assert desk.at(2.0) == ["desire a 0"]
    assert desk.at(4.0) == ["desire a 1"]
    desk.tell(ReplicaStarted("a", "u", "n"), ReplicaReady("nobody"))
