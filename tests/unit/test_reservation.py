"""Whose the devices are in a pool whose replicas stay: what Ray is asked for, for the pool and for each replica."""

from __future__ import annotations

from typing import Any

import pytest

from app.build import actor_options
from cluster import effects, reservation
from cluster.applications import application_of
from cluster.config import ConfigError, Configuration, PoolConfig, load_config
from cluster.config.load import OWN_RAY
from cluster.config.share import LEFT_GPUS, SLEEPER_GPUS
from cluster.config.version import patched, reloaded
from cluster.ledger.specs import NodeSpec
from cluster.reservation import UNUSED_S, Reservation

NODES = {"a": NodeSpec("a", gpus=2), "b": NodeSpec("b", gpus=1), "host": NodeSpec("host")}
NONE = {name: NodeSpec(name) for name in NODES}


class Ray:
    """What Ray does with placement groups; a node in `taken` has none to give."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.groups: dict[str, int] = {}
        self.taken: set[str] = set()
        self.time = 0.0
        monkeypatch.setattr(effects, "reservations", lambda: {each: each not in self.taken for each in self.groups})
        monkeypatch.setattr(effects, "reserve_devices", self.groups.__setitem__)
        monkeypatch.setattr(effects, "release_devices", self.groups.__delitem__)
        monkeypatch.setattr(reservation.time, "monotonic", lambda: self.time)


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Ray:
    return Ray(monkeypatch)


async def test_the_devices_are_held_as_long_as_anything_of_the_pool_lives(ray: Ray):
    first = Reservation()
    assert await first.hold(NODES, is_wanted=True, is_used=False) == NODES
    assert ray.groups == {"a": 2, "b": 1}
    ray.time = UNUSED_S - 1
    await first.hold(NODES, is_wanted=True, is_used=True)
    ray.time = 2 * UNUSED_S - 2
    await first.hold(NODES, is_wanted=True, is_used=False)
    assert ray.groups == {"a": 2, "b": 1}
    # A later life of the ledger finds them; a node that has gone leaves nothing behind.
    later = Reservation()
    assert await later.hold({"a": NODES["a"]}, is_wanted=True, is_used=False) == {"a": NODES["a"]}
    assert ray.groups == {"a": 2}
    ray.time += UNUSED_S
    assert await later.hold(NODES, is_wanted=True, is_used=False) == NODES
    assert ray.groups == {}
    await later.hold(NODES, is_wanted=True, is_used=True)
    assert ray.groups == {"a": 2, "b": 1}
    await later.hold(NODES, is_wanted=False, is_used=True)
    assert ray.groups == {}


async def test_a_node_with_another_jobs_devices_has_none_until_they_are_free(ray: Ray, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reservation, "READY_S", -1.0)
    held = Reservation()
    ray.taken = {"a"}
    assert await held.hold(NODES, is_wanted=True, is_used=True) == {**NODES, "a": NONE["a"]}
    assert await held.hold(NODES, is_wanted=True, is_used=True) == {**NODES, "a": NONE["a"]}
    ray.taken = set()
    assert await held.hold(NODES, is_wanted=True, is_used=True) == NODES


async def test_where_replicas_take_the_devices_themselves_ray_is_not_asked_again(
    ray: Ray, monkeypatch: pytest.MonkeyPatch
):
    none = Reservation()
    assert await none.hold(NODES, is_wanted=False, is_used=True) == NODES
    monkeypatch.delattr(effects, "reservations")
    assert await none.hold(NODES, is_wanted=False, is_used=True) == NODES


def config(environ: dict[str, str] | None = None, **pool: Any) -> PoolConfig:
    models = {"gpu": {"backend": "fake", "num_gpus": 2, "num_cpus": 3}, "cpu": {"backend": "fake", "num_cpus": 3}}
    return load_config({"models": models, **pool}, environ=environ or {})


def test_replicas_stay_by_default_in_a_ray_of_the_pools_own():
    assert config().max_asleep == 0
    assert config({OWN_RAY: "1"}).max_asleep == "auto"
    assert config({OWN_RAY: "1"}, max_asleep=0).max_asleep == 0
    assert config(max_asleep=3).max_asleep == 3
    with pytest.raises(ConfigError, match="max_asleep"):
        config(max_asleep="many")


def test_what_ray_is_asked_for_with_a_replica(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES", raising=False)
    assert actor_options(config(), "gpu") == {"num_gpus": 2, "num_cpus": 3}
    stays = config(max_asleep="auto")
    flag = {"env_vars": {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}}
    assert actor_options(stays, "gpu") == {"num_gpus": SLEEPER_GPUS, "num_cpus": 0, "runtime_env": flag}
    assert actor_options(stays, "cpu") == {"num_gpus": 0, "num_cpus": 0}
    monkeypatch.setenv("RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES", "1")
    assert actor_options(stays, "gpu") == {"num_gpus": SLEEPER_GPUS, "num_cpus": 0}
    assert SLEEPER_GPUS * 100 <= LEFT_GPUS


def test_a_model_that_stays_moves_to_no_other_application_for_more_devices():
    ends, stays = Configuration((1.0, 0), config()), Configuration((1.0, 0), config(max_asleep=1))
    assert patched(ends, "gpu", {"num_gpus": 1}).runtime == {"gpu"}
    assert patched(stays, "gpu", {"num_gpus": 1}).runtime == frozenset()
    assert patched(stays, "gpu", {"num_gpus": 0}).runtime == {"gpu"}
    own = stays._replace(runtime=frozenset({"gpu"}))
    assert application_of(own, "gpu") == f"slotpool-model-gpu-{SLEEPER_GPUS:g}-0"
    with pytest.raises(ConfigError, match="max_asleep"):
        reloaded(stays, config())
