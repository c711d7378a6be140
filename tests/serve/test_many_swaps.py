"""Hundreds of swaps in a row over real Serve: nothing of them is left over, and nothing grows."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.bench.processes import Held, held_by_pool
from tests.pool import REPLICAS_STAY, Pool, fake, running_pool

#: After the first ones everything is there that a swap leaves behind once. Through Serve each takes a second and more.
FIRST, SWAPS = (30, 300) if REPLICAS_STAY else (5, 20)
MODELS = {name: {**fake(tokens=1), "num_gpus": 1, "idle_timeout": 0} for name in ("one", "two")}
#: How much more memory may be held in the end, and how many more descriptors: Ray's own come and go.
GROWTH, DESCRIPTORS = 1.05, 10


@pytest.fixture(scope="module")
def pool(port: int) -> Iterator[Pool]:
    with running_pool(port, {"models": MODELS}) as pool:
        yield pool


def settled(pool: Pool) -> tuple[Held, int]:
    """What the pool holds once nothing moves, and how many replicas it has."""
    pool.check()
    ledger = pool.wait(lambda ledger: {row["state"] for row in ledger["replicas"]} <= {"READY", "ASLEEP"})
    time.sleep(0.5)
    return held_by_pool(os.getpid()), len(ledger["replicas"])


@pytest.mark.timeout(240)
def test_swaps_in_a_row_leave_nothing_behind(pool: Pool):
    messages: Any = [{"role": "user", "content": "x"}]
    for swap in range(SWAPS):
        if swap == FIRST:
            before, replicas = settled(pool)
        model = ("one", "two")[swap % 2]
        answer = pool.openai().chat.completions.create(model=model, messages=messages)
        assert answer.choices[0].message.content == f"{model}:0 "
    after, replicas_after = settled(pool)
    print(before, after)
    assert replicas_after == replicas == (2 if REPLICAS_STAY else 1)
    assert after.processes == before.processes
    assert after.descriptors <= before.descriptors + DESCRIPTORS
    assert after.memory_mib <= before.memory_mib * GROWTH
