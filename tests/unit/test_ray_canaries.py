"""Each private interface of Ray that the pool uses, what would break without it, and what the pool does then."""

from __future__ import annotations

import importlib
import inspect
import sys
from types import SimpleNamespace

import pytest
import ray
from ray.serve import autoscaling_policy
from ray.serve._private.common import RequestMetadata

import deployments.routing
from cluster import effects

ROUTER = "ray.serve._private.request_router.pow_2_router.PowerOfTwoChoicesRequestRouter"

#: The attribute, and what would break.
ATTRIBUTES = [
    ("ray._private.gcs_pubsub.GcsAioActorSubscriber", "deaths of actors are polled for: leases return a second later"),
    ("ray._private.gcs_pubsub.GcsAioActorSubscriber.subscribe", "deaths of actors are not heard of"),
    ("ray._private.gcs_pubsub.GcsAioActorSubscriber.poll", "deaths of actors are not heard of"),
    ("ray.core.generated.gcs_pb2.ActorTableData", "deaths of actors are polled for"),
    ("ray._private.state.actors", "a death before an announcement is not noticed, and there is no polling"),
    ("ray._private.state.GlobalState.get_draining_nodes", "a node that is drained gets engines until it is gone"),
    ("ray._raylet.CoreWorker.resource_ids", "the ledger guesses which devices Ray has booked for each process"),
    ("ray.serve.autoscaling_policy._get_cold_start_scale_up_replicas", "Serve starts replicas by itself at times"),
    (f"{ROUTER}._choose_replica_for_request", "no call reaches its replica through Serve: the pool does not start"),
    ("ray.serve._private.request_router.common.PendingRequest", "the pool does not start"),
    ("ray.serve._private.request_router.replica_wrapper.RunningReplica", "the pool does not start"),
]

#: The callable, the arguments that it is called with, and what would break.
SIGNATURES = [
    ("ray._private.gcs_pubsub.GcsAioActorSubscriber.poll", ["self", "batch_size"], "deaths are not heard of"),
    (f"{ROUTER}._choose_replica_for_request", ["self", "pending_request", "is_retry"], "leases are not pinned"),
    ("ray.serve.autoscaling_policy._get_cold_start_scale_up_replicas", ["ctx"], "Serve starts replicas by itself"),
]


def find(path: str) -> object:
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError:
        return getattr(find(module), name)


@pytest.mark.parametrize(("path", "breaks"), ATTRIBUTES)
def test_it_is_there(path, breaks):
    try:
        find(path)
    except (AttributeError, ImportError) as error:
        pytest.fail(f"this Ray has no {path} any more ({error}); {breaks}")


@pytest.mark.parametrize(("path", "arguments", "breaks"), SIGNATURES)
def test_it_takes_what_we_give(path, arguments, breaks):
    known = list(inspect.signature(find(path)).parameters)
    assert set(arguments) <= set(known), f"{path} takes {known} now; {breaks}"


def test_the_names_inside():
    router = inspect.getsource(importlib.import_module("ray.serve._private.request_router.request_router"))
    for name in ("self._replicas:", "self._replicas_updated_event"):
        assert name in router, f"the router has no {name} any more: PinRouter waits in vain for a replica to appear"
    assert "session_id" in RequestMetadata.__dataclass_fields__, "handles cannot name the replica that a lease is for"
    policy = inspect.getsource(autoscaling_policy._apply_autoscaling_config)
    assert "_get_cold_start_scale_up_replicas(" in policy, "Serve starts replicas by itself at times"
    proto = effects.ActorTableData
    assert proto.DEAD != proto.RESTARTING, "states of actors have other names now"


async def test_without_subscriptions_deaths_are_polled_for(monkeypatch):
    looks = iter(
        [
            {"a": {"State": "ALIVE", "NumRestarts": 0}, "b": {"State": "DEAD", "NumRestarts": 0}},
            {"a": {"State": "ALIVE", "NumRestarts": 1}, "b": {"State": "DEAD", "NumRestarts": 0}},
            {"a": {"State": "DEAD", "NumRestarts": 1}, "b": {"State": "DEAD", "NumRestarts": 0}},
            {"a": {"State": "DEAD", "NumRestarts": 1}, "c": {"State": "RESTARTING", "NumRestarts": 1}},
        ]
    )
    monkeypatch.setattr(effects, "GcsAioActorSubscriber", None)
    monkeypatch.setattr(effects, "DEATHS_PERIOD_S", 0.0)
    monkeypatch.setattr(ray._private.state, "actors", lambda: next(looks))
    deaths = effects.dead_actors()
    assert [await anext(deaths) for _ in range(4)] == ["b", "a", "a", "c"]
    await deaths.aclose()


def test_without_the_cold_start_hook_serve_does_as_it_likes(monkeypatch, caplog):
    monkeypatch.delattr(autoscaling_policy, "_get_cold_start_scale_up_replicas")
    effects.disregard_stale_requests(lambda context: True)
    assert "_get_cold_start_scale_up_replicas" in caplog.text


def test_without_a_router_to_pin_with_the_pool_does_not_start(monkeypatch):
    stub = SimpleNamespace(PowerOfTwoChoicesRequestRouter=type("Router", (), {}))
    monkeypatch.setitem(sys.modules, ROUTER.rpartition(".")[0], stub)
    with pytest.raises(ImportError, match="no router that a leased request could be pinned with"):
        importlib.reload(deployments.routing)
    monkeypatch.undo()
    importlib.reload(deployments.routing)


def test_without_word_of_what_ray_has_booked_the_ledger_guesses(monkeypatch):
    monkeypatch.setattr(ray._private.worker.global_worker, "core_worker", object(), raising=False)
    assert effects.booked_devices() == ()
