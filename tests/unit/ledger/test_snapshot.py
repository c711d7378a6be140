"""What the ledger shows of itself, as values and as plain data."""

from __future__ import annotations

import dataclasses
import json

import pytest

from cluster.ledger.events import LeaseReleased, ReplicaReady, ReplicaStarted, RequestArrived, RequestCancelled
from cluster.ledger.ledger import Ledger
from cluster.ledger.snapshot import as_dict
from cluster.ledger.specs import ModelSpec, NodeSpec, PoolSpec, ServerSpec
from tests.unit.ledger.desk import Desk, model

SPEC = PoolSpec(
    models={name: ModelSpec(name, num_gpus=1.0, memory_mib=64) for name in "ab"},
    nodes={"n": NodeSpec("n", gpus=1)},
    servers=(ServerSpec("http://one"),),
    turn_swaps=0.0,
)


@pytest.fixture
def ledger() -> Ledger:
    """`a` runs a request on the only device, and drains for the two that wait for `b`."""
    ledger = Ledger(SPEC, epoch="e", now=0.0)
    ledger.decide(RequestArrived("r", "h", "a", 2, 9e9), 1.0)
    ledger.decide(ReplicaStarted("a", "u", "n"), 1.0)
    ledger.decide(ReplicaReady("u", 100, None, ("0",)), 2.0)
    ledger.decide(RequestArrived("s", "h", "b", 1, 9e9), 3.0)
    ledger.decide(RequestArrived("t", "h", "b", 3, 9e9), 4.0)
    return ledger


def test_the_rows_of_a_snapshot(ledger: Ledger) -> None:
    snapshot = ledger.snapshot()
    (replica,) = snapshot.replicas
    assert (replica.model, replica.replica, replica.state, replica.leases) == ("a", "u", "DRAINING", 1)
    assert (replica.devices, replica.visible_devices) == ((0,), ("0",))
    assert (replica.pid, replica.progress) == (None, None)
    assert (snapshot.models["a"].memory_mib, snapshot.models["a"].memory_estimated_mib) == (100, 64)
    assert snapshot.models["b"].queued_by_class == (1, 0, 1)
    assert [server.url for server in snapshot.servers] == ["http://one"]


def test_a_snapshot_is_a_value(ledger: Ledger) -> None:
    before = ledger.snapshot()
    with pytest.raises(dataclasses.FrozenInstanceError):
        before.leases = 0  # type: ignore[misc]
    ledger.decide(RequestArrived("u", "h", "b", 2, 9e9), 5.0)
    assert before.models["b"].queued == 2
    assert before != ledger.snapshot()


def test_progress_stands_only_at_what_loads(ledger: Ledger) -> None:
    snapshot = ledger.snapshot()
    assert "progress" not in as_dict(snapshot)["replicas"][0]
    loads = snapshot.replicas[0]._replace(state="LOADING", progress=0.5)
    plain = as_dict(dataclasses.replace(snapshot, replicas=(loads,)))
    assert json.loads(json.dumps(plain))["replicas"][0]["progress"] == 0.5


def test_a_snapshot_says_who_waits_since_when_and_for_what(ledger: Ledger) -> None:
    """Half of what the status page tells of a swap: the other half are the changes behind it."""
    snapshot = ledger.snapshot()
    waits = snapshot.models["b"]
    assert waits.since_by_class == (3.0, None, 4.0)
    assert waits.bound_at == 3.0 + 15.0
    assert waits.swap is not None
    assert (waits.swap.victims, waits.swap.reason, waits.swap.waiter) == (("u",), "class", "s")
    assert (snapshot.models["a"].swap, snapshot.models["a"].bound_at) == (None, None)
    assert [(node.name, node.gpus) for node in snapshot.nodes] == [("n", 1)]
    assert snapshot.replicas[0].used == 1


def test_a_brief_tells_how_much_of_each_replica_is_in_use(ledger: Ledger) -> None:
    briefs = ledger.briefs()
    assert [use._asdict() for use in briefs["a"].uses] == [{"record": 2, "leases": 1, "used": 1, "slots": 1}]
    assert briefs["b"].uses == (), "it has no place yet"


def test_a_brief_shows_nobody_who_has_left() -> None:
    """The one behind the head of a line leaves it, then the head is served, and nothing else happens."""
    desk = Desk(model("a"))
    for number in range(1, 5):
        desk.now = float(number)
        desk.arrive(f"r{number}", "a")
    desk.boot("a", "u")
    desk.tell(RequestCancelled("r3"))
    # Not through the desk, whose look at the invariants would find the next in line.
    desk.ledger.decide(LeaseReleased("r1", desk.grants["r1"].generation), desk.now)
    assert desk.ledger.briefs()["a"].since_by_class == (None, 4.0, None)
