"""The ledger's face: what is malformed, what is shown, what is checked."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from cluster.ledger import snapshot, tree
from cluster.ledger.books.queue import INFINITY, WaitQueue
from cluster.ledger.books.records import Waiter
from cluster.ledger.events import (
    ConfigChanged,
    LeaseReannounced,
    LeaseReleased,
    NodesChanged,
    ReplicaReady,
    ReplicaStarted,
    RequestArrived,
    Ticked,
)
from cluster.ledger.states import TRANSITIONS, Cause, ReplicaState
from tests.unit.ledger.desk import Desk, model

BAD: list[Any] = [
    None,
    object(),
    "Ticked",
    RequestArrived("r", "h", "A", 0, 5.0),
    RequestArrived("r", "h", "A", 4, 5.0),
    RequestArrived("r", "h", "A", 2, float("nan")),
    RequestArrived("r", "h", "A", 2, float("inf")),
    RequestArrived("r", "h", "A", 2, 5.0, float("nan")),
    RequestArrived("r", "h", "A", 2, 5.0, "soon"),  # type: ignore[arg-type]
    RequestArrived(1, "h", "A", 2, 5.0),  # type: ignore[arg-type]
    RequestArrived("r", "h", "A", 2, 5.0, is_patient="yes"),  # type: ignore[arg-type]
    LeaseReleased("r", None),  # type: ignore[arg-type]
    LeaseReannounced("r", "h", "A", "A#1", 1, 9),
    ConfigChanged({}),  # type: ignore[arg-type]
    NodesChanged({1: None}),  # type: ignore[dict-item]
    NodesChanged({"n": None}),  # type: ignore[dict-item]
    ReplicaReady("A#1", -1),
    ReplicaReady("A#1", slots=-1),
]


@pytest.mark.parametrize("event", BAD, ids=range(len(BAD)))
def test_illegal_event_is_logged_and_changes_nothing(event: Any, caplog: pytest.LogCaptureFixture) -> None:
    desk = Desk(model("A"))
    logging.getLogger("cluster.ledger").setLevel(logging.ERROR)
    before = desk.ledger.snapshot()
    with caplog.at_level(logging.ERROR, "cluster.ledger"):
        assert desk.ledger.decide(event, 0.0) == []
    assert "ignored" in caplog.text
    assert desk.ledger.snapshot() == before


@pytest.mark.parametrize("now", [float("nan"), float("inf"), -float("inf")])
def test_time_that_is_none_changes_nothing(now: float) -> None:
    desk = Desk(model("A"))
    assert desk.ledger.decide(RequestArrived("r", "h", "A", 2, 5.0), now) == []
    assert desk.ledger.snapshot().submitted == 0


def test_illegal_transition_raises_and_changes_nothing() -> None:
    desk = Desk(model("A"))
    desk.warm("A", "A#1")
    replica = desk.ledger._pool.replicas["A#1"]
    with pytest.raises(KeyError):
        desk.ledger._pool.move(replica, Cause.PLACED, 0.0)
    desk.ledger.check()
    assert (ReplicaState.STOPPING, Cause.REOPENED) not in TRANSITIONS
    assert ReplicaState.DRAINING.is_desired
    assert not ReplicaState.STOPPING.is_desired


def test_what_is_shown() -> None:
    desk = Desk(model("A", slots=1), model("B"), gpus=1)
    models = lambda: {name: each.state for name, each in desk.ledger.snapshot().models.items()}  # noqa: E731
    assert repr(desk.ledger) == "<Ledger e1: 0 active, 0 queued, 0 idle>"
    assert snapshot.no_progress_since(desk.ledger._pool) == INFINITY
    desk.arrive("a1", "A")
    desk.now = 1.0
    desk.arrive("a2", "A")
    assert repr(desk.ledger) == "<Ledger e1: 0 active, 2 queued, 0 idle, 1 starting>"
    assert repr(next(iter(desk.ledger._pool.models["A"].replicas))) == "<Replica A/? STARTING 0/1>"
    assert snapshot.no_progress_since(desk.ledger._pool) == 0.0
    assert models() == {"A": "loading", "B": "unloaded"}
    desk.boot("A", "A#1")
    assert models()["A"] == "loaded"
    assert desk.ledger.queue_position("a2") == ("queued", 1)
    assert desk.ledger.queue_position("nobody") is None
    desk.release("a1")
    desk.release("a2")
    desk.arrive("b1", "B")
    assert models()["A"] == "unloading"
    desk.gone("A#1")
    desk.tell(ReplicaStarted("B", "B#1", "n"))
    from cluster.ledger.events import ReplicaFailed

    desk.tell(ReplicaFailed("B#1", "no"))
    assert models()["B"] == "failed"
    assert desk.ledger.epoch == "e1"


def test_position_is_bounded() -> None:
    desk = Desk(model("A"), queue_max_size=2000)
    for index in range(30):
        desk.arrive(f"r{index}", "A")
    pool = desk.ledger._pool
    assert pool.models["A"].queue.position(pool.waiters["r29"], limit=10) == 10
    assert len(pool.models["A"].queue) == 30
    assert WaitQueue().head() is None


def test_a_line_begins_anew_when_all_of_it_has_left() -> None:
    """Whoever joins an empty class is its head, also when nobody has looked since the last one of it left."""
    desk = Desk(model("A"))
    now = 0.0
    queue: WaitQueue[Waiter] = WaitQueue()
    a = desk.ledger._pool.models["A"]
    high, low, later = (
        Waiter(name, "h", a, priority, 9.0, None, now) for name, priority in zip("hlk", (1, 3, 1), strict=True)
    )
    queue.join(high, now, 30.0)
    queue.join(low, now, 30.0)
    assert queue.head() is high
    high.waits = False
    queue.leave(high)
    queue.join(later, 20.0, 30.0)
    assert (queue.head(), list(queue.heads()), queue.first_deadline()) == (later, [later, low], 9.0)


def test_decisions_end_even_if_they_should_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Should a mistake keep the tree busy for ever, it stops, says so, and goes on at the next event."""
    monkeypatch.setattr(tree, "MAX_ROUNDS", 0)
    desk = Desk(model("A"))
    logging.getLogger("cluster.ledger").setLevel(logging.ERROR)
    with caplog.at_level(logging.ERROR, "cluster.ledger"):
        assert desk.ledger.decide(RequestArrived("r1", "h", "A", 2, 600.0), 0.0) == []
    assert "no decision" in caplog.text
    monkeypatch.setattr(tree, "MAX_ROUNDS", 1000)
    assert desk.tell(Ticked()) == ["desire A 1"]


def test_which_models_are_known() -> None:
    desk = Desk(model("A"))
    assert desk.ledger.knows("A")
    assert not desk.ledger.knows("B")
