"""An operator's load, from the order to its end: it counts on starts that are under way, and is never lost."""

from __future__ import annotations

import pytest

from cluster.ledger.events import (
    LoadRefused,
    LoadRequested,
    ReplicaFailed,
    ReplicaGone,
    ReplicaReady,
    ReplicaStarted,
    RequestArrived,
    RequestCancelled,
    UnloadRequested,
)
from cluster.ledger.ledger import Ledger
from cluster.ledger.specs import ModelSpec, NodeSpec, PoolSpec


@pytest.fixture
def ledger() -> Ledger:
    models = {"a": ModelSpec("a", num_gpus=1.0, max_replicas=2)}
    return Ledger(PoolSpec(models=models, nodes={"n": NodeSpec("n", gpus=2)}), epoch="e", now=0.0)


def view(ledger: Ledger):
    ledger.check()
    found = ledger.model("a")
    assert found is not None
    return found


def test_an_order_joins_a_start_on_demand_and_outlives_its_requests(ledger: Ledger):
    """The client who made the model load leaves; the operator who asked for it meanwhile still gets it."""
    ledger.decide(RequestArrived("r", "h", "a", 2, 60.0), 0.0)
    assert view(ledger).state == "loading"
    ledger.decide(LoadRequested("a", 1), 0.1)
    ledger.decide(RequestCancelled("r"), 0.2)
    assert view(ledger).ordered
    assert ledger.desired == {"a": 1}
    ledger.decide(ReplicaStarted("a", "u", "n"), 0.3)
    ledger.decide(ReplicaReady("u"), 0.4)
    assert (view(ledger).ordered, view(ledger).ready) == (False, 1)


def test_a_smaller_order_does_not_cut_a_larger_one(ledger: Ledger):
    ledger.decide(LoadRequested("a", 2), 0.0)
    ledger.decide(LoadRequested("a", 1), 0.1)
    for uid in ("u", "v"):
        ledger.decide(ReplicaStarted("a", uid, "n"), 0.2)
    ledger.decide(ReplicaReady("u"), 0.3)
    assert view(ledger).ordered
    ledger.decide(ReplicaFailed("v", "broken"), 0.4)
    assert (view(ledger).ordered, view(ledger).ready, view(ledger).last_error) == (False, 0, "broken")


def test_a_larger_order_takes_over_the_batch_of_a_smaller_one(ledger: Ledger):
    """All or nothing holds for what the larger one counts on, too."""
    ledger.decide(LoadRequested("a", 1), 0.0)
    ledger.decide(LoadRequested("a", 2), 0.1)
    for uid in ("u", "v"):
        ledger.decide(ReplicaStarted("a", uid, "n"), 0.2)
    ledger.decide(ReplicaReady("u"), 0.3)
    ledger.decide(ReplicaFailed("v", "broken"), 0.4)
    assert ledger.desired == {"a": 0}
    for uid in ("u", "v"):
        ledger.decide(ReplicaGone(uid), 0.5)
    assert (view(ledger).state, view(ledger).replicas) == ("failed", 0)


def test_a_loaded_model_needs_no_order(ledger: Ledger):
    ledger.decide(LoadRequested("a", 1), 0.0)
    ledger.decide(ReplicaStarted("a", "u", "n"), 0.2)
    ledger.decide(ReplicaReady("u"), 0.3)
    assert ledger.decide(LoadRequested("a", 1), 0.4) == []
    assert not view(ledger).ordered


def test_what_is_being_unloaded_is_not_loaded(ledger: Ledger):
    ledger.decide(RequestArrived("r", "h", "a", 2, 60.0), 0.0)
    ledger.decide(ReplicaStarted("a", "u", "n"), 0.2)
    ledger.decide(ReplicaReady("u"), 0.3)
    ledger.decide(UnloadRequested("a"), 0.4)
    assert view(ledger).unloading
    (refused,) = ledger.decide(LoadRequested("a", 1), 0.5)
    assert isinstance(refused, LoadRefused)
    assert refused.extras == {"code": "model_unloading", "status": 409}
    assert ledger.model("nobody") is None
