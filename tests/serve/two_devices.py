"""Devices are what the ledger assigned, over real Serve with two logical GPUs; run by `test_devices.py`."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from typing import Any

import pytest

from tests.pool import Pool, fake, local_serve, running_pool

MODELS = {
    "small": {**fake(tokens=2), "num_gpus": 0.4, "group": "apart"},
    "large": {**fake(tokens=2), "num_gpus": 0.6, "group": "apart"},
    "whole": {**fake(tokens=2), "num_gpus": 1},
    "bound": {**fake(tokens=2), "num_gpus": 0.3, "gpu": 1},
    "host": fake(tokens=2),
}


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with local_serve(gpus=2) as port, running_pool(port, {"models": MODELS}) as pool:
        yield pool
        pool.check()


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
