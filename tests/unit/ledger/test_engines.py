"""The life of an engine inside a replica: ordered to load, suspected, dead, loaded again in place."""

from __future__ import annotations

from cluster.ledger.events import (
    LoadEngine,
    ReplicaReady,
    ReplicaStarted,
    ReplicaSuspected,
)
from tests.unit.ledger.desk import Desk, model


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


def test_the_address_of_an_engine_goes_into_its_grants() -> None:
    desk = Desk(model("a"))
    desk.arrive("r1", "a")
    desk.tell(ReplicaStarted("a", "u", "n"), ReplicaReady("u", address=("unix", "/run/u")))
    assert desk.grants["r1"].address == ("unix", "/run/u")


def test_an_engine_that_hangs_is_restarted_once() -> None:
    desk = Desk(model("a"))
    desk.arrive("r1", "a")
    desk.tell(ReplicaStarted("a", "u", "n"))
    assert desk.tell(ReplicaSuspected("u")) == []
    desk.tell(ReplicaReady("u"))
    assert desk.tell(ReplicaSuspected("u"), ReplicaSuspected("u")) == ["restart u"]
    assert desk.tell(ReplicaSuspected("nobody")) == []
