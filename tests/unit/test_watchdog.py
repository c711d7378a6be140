"""When a pool is called stuck, on a ledger of its own and a clock of the test's."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.ledger.events import ReplicaGone, ReplicaReady, ReplicaStarted, RequestArrived, RequestCancelled
from cluster.ledger.ledger import Ledger
from cluster.ledger.snapshot import ModelRow, Snapshot
from cluster.ledger.specs import ModelSpec, NodeSpec, PoolSpec
from cluster.watchdog import SLACK_S, limit_s, stalled

SPEC = PoolSpec(
    models={name: ModelSpec(name, num_gpus=1.0, load_timeout_s=25.0) for name in "ab"},
    nodes={"n": NodeSpec("n", gpus=1)},
)
LIMIT_S = 25.0 + SLACK_S


@pytest.fixture
def ledger() -> Ledger:
    """A pool whose only device has an idle replica of `a`, which is told to stop at 1.0 for a request for `b`."""
    ledger = Ledger(SPEC, epoch="e", now=0.0)
    ledger.decide(RequestArrived("r", "h", "a", 2, 9e9), 0.0)
    ledger.decide(ReplicaStarted("a", "u", "n"), 0.0)
    ledger.decide(ReplicaReady("u"), 0.5)
    return ledger


def test_the_limit_lies_above_the_longest_load():
    assert limit_s(SPEC) == LIMIT_S
    assert limit_s(PoolSpec()) == SLACK_S


def test_a_pool_in_which_nobody_waits_is_not_stuck(ledger: Ledger):
    assert stalled(ledger.snapshot(), 0.5, 1e6, LIMIT_S) is None


def test_a_wait_for_running_streams_is_not_stuck(ledger: Ledger):
    ledger.decide(RequestArrived("s", "h", "b", 2, 9e9), 1.0)
    assert stalled(ledger.snapshot(), 1.0, 500.0, LIMIT_S) is None


def test_a_process_that_does_not_end_is_named(ledger: Ledger):
    ledger.decide(RequestCancelled("r"), 0.9)
    ledger.decide(RequestArrived("s", "h", "b", 2, 9e9), 1.0)
    assert stalled(ledger.snapshot(), 1.0, 1.0 + LIMIT_S, LIMIT_S) is None
    reason = stalled(ledger.snapshot(), 30.0, 1.1 + LIMIT_S, LIMIT_S)
    assert reason == "1 request(s) wait for b; a replica of a was told to stop 30 s ago and has not ended"
    ledger.decide(ReplicaGone("u"), 40.0)
    assert stalled(ledger.snapshot(), 40.0, 40.1, LIMIT_S) is None


def test_an_engine_that_does_not_end_is_named():
    spec = replace(SPEC, max_asleep=None)
    ledger = Ledger(spec, epoch="e", now=0.0)
    ledger.decide(RequestArrived("r", "h", "a", 2, 9e9), 0.0)
    ledger.decide(ReplicaStarted("a", "u", "n"), 0.0)
    ledger.decide(ReplicaReady("u"), 0.5)
    ledger.decide(RequestCancelled("r"), 0.9)
    ledger.decide(RequestArrived("s", "h", "b", 2, 9e9), 1.0)
    reason = stalled(ledger.snapshot(), 30.0, 1.1 + LIMIT_S, LIMIT_S)
    assert reason == "1 request(s) wait for b; the engine of a replica of a was told to stop 30 s ago and has not ended"


def test_silence_is_a_fault_only_from_the_last_move_on():
    """A scheduler that forgets a waiter; here the books of one are made up, since ours does not."""
    models = {"a": ModelRow(queued=2, waiting_since=10.0), "b": ModelRow()}
    snapshot = Snapshot("e", models=models)
    assert stalled(snapshot, 10.0, 39.0, LIMIT_S) is None
    assert stalled(snapshot, 10.0, 41.0, LIMIT_S) == "2 request(s) wait for a; nothing has moved for 31 s"
    assert stalled(snapshot, 20.0, 41.0, LIMIT_S) is None
    assert stalled(replace(snapshot, leases=1), 10.0, 41.0, LIMIT_S) is None
    assert stalled(replace(snapshot, recovering=True), 10.0, 41.0, LIMIT_S) is None
