"""A restarted ledger that does not know the newest configuration yet keeps what it hears, and judges nothing by an old
one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.ledger.events import (
    ConfigChanged,
    HolderDied,
    LeaseReannounced,
    NodesChanged,
    ReplicaReady,
    ReplicaStarted,
    RequestCancelled,
    ServerManifest,
)
from cluster.ledger.handlers import early
from cluster.ledger.specs import NodeSpec, PoolSpec, ServerSpec
from tests.unit.ledger.desk import Desk, model

NEW = PoolSpec(
    models={"a": model("a", slots=4, revision="2"), "later": model("later")}, nodes={"n": NodeSpec("n", gpus=2)}
)


def waiting() -> Desk:
    """Its window ends at 2.0; it knows one model of an older revision."""
    return Desk(model("a", slots=2, revision="1"), gpus=2, recovering_until=2.0, configured=False)


def test_what_was_registered_at_run_time_is_still_there() -> None:
    desk = waiting()
    assert desk.boot("later", "u") == []
    assert desk.tell(LeaseReannounced("old", "h", "later", "u", 7)) == []
    assert desk.arrive("r1", "later") == []
    assert desk.arrive("r2", "nobody") == []
    assert desk.tell(ConfigChanged(NEW)) == ["reject r2 ModelNotFound"]
    assert desk.state("u") == "READY"
    assert desk.at(2.0) == ["desire a 0", "desire later 1"]
    assert desk.ledger.snapshot().leases == 1


def test_replicas_are_not_judged_by_the_old_revision() -> None:
    desk = waiting()
    desk.boot("a", "u")
    desk.tell(LeaseReannounced("w", "h", "a", "u", 7, slots=4))
    desk.tell(ConfigChanged(NEW))
    assert desk.at(2.0) == ["desire later 0", "desire a 1"]
    assert len(desk.ledger._pool.leases["w"].slots) == 4


def test_the_window_stays_open_until_the_configuration_comes() -> None:
    desk = waiting()
    desk.boot("a", "u")
    desk.arrive("r1", "a")
    assert desk.at(2.0) == []
    assert desk.at(20.0) == []
    assert desk.ledger.is_recovering
    assert desk.ledger.awaits_configuration
    assert desk.tell(ConfigChanged(NEW)) == []
    assert not desk.ledger.awaits_configuration
    assert desk.at(20.5) == [], "the leases of other holders may still come"
    assert desk.ledger.next_deadline() == 21.0
    assert desk.at(21.0) == ["grant r1 u", "desire later 0", "desire a 1"]


def test_patience_ends_and_what_is_known_must_do() -> None:
    desk = waiting()
    desk.boot("a", "u")
    desk.arrive("r1", "a")
    assert desk.ledger.next_deadline() == 32.0
    assert desk.at(31.9) == []
    assert desk.at(32.0) == ["grant r1 u", "desire a 1"]
    assert desk.tell(ConfigChanged(replace(desk.spec, capacity=3))) == []


def test_deadlines_hold_meanwhile() -> None:
    desk = waiting()
    desk.arrive("r1", "a", timeout=1.0)
    desk.arrive("r1", "a", timeout=1.0)
    desk.arrive("r2", "a", timeout=1.0)
    desk.arrive("r3", "a", timeout=9.0)
    desk.tell(RequestCancelled("r2"))
    assert desk.ledger.next_deadline() == 1.0
    assert desk.at(1.0) == ["reject r1 BackendTimeout"]
    assert desk.ledger.next_deadline() == 9.0
    assert desk.at(9.0) == ["reject r3 BackendTimeout"]
    assert desk.ledger.next_deadline() == 32.0


def test_what_happens_meanwhile_happens_in_order() -> None:
    desk = waiting()
    desk.boot("a", "u")
    desk.tell(LeaseReannounced("x", "dead", "a", "u", 3), HolderDied("dead"))
    desk.arrive("r1", "a")
    desk.tell(RequestCancelled("r1"))
    assert desk.tell(ConfigChanged(NEW)) == []
    state = desk.ledger.snapshot()
    assert (state.leases, state.queued) == (0, 0)


def test_machines_are_known_at_once() -> None:
    desk = waiting()
    desk.tell(NodesChanged({"n": NodeSpec("n", gpus=8)}))
    assert desk.ledger._pool.book.nodes["n"].spec.gpus == 8


def test_servers_of_the_new_configuration_are_heard() -> None:
    desk = waiting()
    desk.tell(ConfigChanged(replace(NEW, servers=(ServerSpec("http://one"),))))
    assert desk.tell(ServerManifest("http://one", ("m",))) == []
    desk.tell(ReplicaStarted("a", "u", "n"), ReplicaReady("u"))
    desk.arrive("r1", "m")
    assert "grant r1 http://one" in desk.at(2.0)


def test_there_is_a_limit_to_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(early, "MAX_EVENTS", 1)
    desk = waiting()
    assert desk.arrive("r1", "a") == []
    assert desk.arrive("r2", "a") == ["reject r2 BackendUnavailable"]


def test_the_end_of_the_window_can_be_moved() -> None:
    desk = Desk(model("a"), recovering_until=9.0)
    desk.ledger.recover_until(2.0)
    assert desk.ledger.next_deadline() == 2.0
    assert desk.at(2.0) == ["desire a 0"]
    desk.ledger.recover_until(5.0)
    assert not desk.ledger.is_recovering
