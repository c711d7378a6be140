"""Devices are what the ledger assigned, over real Serve with two logical GPUs; run by `test_devices.py`."""

from __future__ import annotations

import collections
import random
from collections.abc import Iterator
from typing import Any

import pytest
import ray

from cluster.ledger.books.packing import pack
from cluster.ledger.books.shapes import UNIT, shape_of
from cluster.ledger.specs import ModelSpec
from tests.pool import Pool, fake, local_serve, running_pool
from tests.sim.ray import devices as rays_rules
from tests.unit.raylet import wait_until

MODELS = {
    "small": {**fake(tokens=2), "num_gpus": 0.4, "group": "apart"},
    "large": {**fake(tokens=2), "num_gpus": 0.6, "group": "apart"},
    "whole": {**fake(tokens=2), "num_gpus": 1},
    "bound": {**fake(tokens=2), "num_gpus": 0.3, "gpu": 1},
    "host": fake(tokens=2),
}


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with local_serve(gpus=2) as port:
        yield port


@pytest.fixture(scope="module")
def pool(port: int) -> Iterator[Pool]:
    with running_pool(port, {"models": MODELS}) as pool:
        yield pool
        pool.check()


def test_ray_packs_as_the_ledger_and_the_simulation_have_it(port: int):
    """Before any pool has reserved the devices: fractions come and go, and each goes where both say."""
    rng, free = random.Random(5), [1.0, 1.0]
    alive: list[tuple[Any, float, tuple[int, ...]]] = []
    packed = set()
    for _ in range(16):
        shares = [each for each in (0.2, 0.3, 0.4, 0.5, 1.0, 2.0) if rays_rules(free, each) is not None]
        if alive and (rng.random() < 0.4 or not shares):
            actor, share, booked = alive.pop(rng.randrange(len(alive)))
            ray.kill(actor)
            change(free, booked, share)
            wait_until(lambda: abs(ray.available_resources().get("GPU", 0.0) - sum(free)) < 1e-6)
            continue
        share = rng.choice(shares)
        actor = ray.remote(Booked).options(num_cpus=0, num_gpus=share).remote()
        booked = ray.get(actor.devices.remote())
        assert booked == rays_rules(free, share), f"{share} of {free}"
        shape = shape_of(ModelSpec("m", num_gpus=share), None)
        assert booked == pack([round(each * UNIT) for each in free], shape), f"{share} of {free}"
        change(free, booked, -share)
        alive.append((actor, share, booked))
        packed.add(booked)
    assert {(0,), (1,)} <= packed
    for actor, *_ in alive:
        ray.kill(actor)


class Booked:
    """A process that says what Ray has booked for it."""

    def devices(self) -> tuple[int, ...]:
        from cluster import effects

        return effects.booked_devices()


def change(free: list[float], booked: tuple[int, ...], share: float) -> None:
    for device in booked:
        free[device] = round(free[device] + max(-1.0, min(1.0, share)), 6)


def say(pool: Pool, model: str) -> None:
    answer = pool.openai().chat.completions.create(model=model, messages=[{"role": "user", "content": "x"}])
    assert answer.choices[0].message.content == f"{model}:0 {model}:1 "


def devices(pool: Pool) -> dict[str, tuple[int, ...]]:
    """The devices of each model that is loaded, by the ledger's book, which its engine's process confirms."""
    found: dict[str, tuple[int, ...]] = {}
    taken: dict[int, float] = collections.defaultdict(float)
    rows: list[dict[str, Any]] = pool.ledger()["replicas"]
    for row in rows:
        if row["state"] != "READY":
            continue
        visible = [name for name in row["visible_devices"] if name]
        assert visible == [str(device) for device in row["devices"]], row
        found[row["model"]] = tuple(row["devices"])
        for device in row["devices"]:
            taken[device] += MODELS[row["model"]]["num_gpus"]
    assert all(share <= 1.0001 for share in taken.values()), taken
    return found


def test_each_engine_sees_the_devices_of_the_ledgers_book(pool: Pool):
    for model in ("small", "large", "host"):
        say(pool, model)
    found = devices(pool)
    assert found["host"] == ()
    assert sorted(found["small"] + found["large"]) == [0, 1], "a group stands apart on real devices"
    say(pool, "whole")
    found = devices(pool)
    assert len(found["whole"]) == 1
    say(pool, "small")
    say(pool, "bound")
    found = devices(pool)
    assert found["bound"] == (1,)
    for model in ("large", "whole", "small", "bound", "large"):
        say(pool, model)
        devices(pool)
