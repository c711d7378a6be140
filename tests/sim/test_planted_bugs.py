"""Proof that the simulation would notice if the ledger were wrong, in ways that the state machine's pool cannot show.

Each of these is a mistake that a ledger has made, as a patch of one function, and must be caught within 100 seeds.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cluster.ledger.books import pool, records
from cluster.ledger.ledger import Ledger
from cluster.ledger.rules import policy
from cluster.ledger.specs import ModelSpec, NodeSpec, PoolSpec
from tests.sim import test_spread
from tests.sim.test_simulation import run
from tests.sim.world import World
from tests.stateful.test_planted_bugs import (
    a_start_is_planned_once,
    serve_stops_whom_we_like,
    the_newest_stops_on_any_node,
)

SEEDS = 100


def what_serves_is_too_large(patch: pytest.MonkeyPatch) -> None:
    """A model that was measured to take more than its node has is refused while it serves."""

    def wrong(books: pool.Pool, model: records.Model, replicas: int = 1) -> policy.Refusal | None:
        if books.book.could_ever_fit(model.shape, replicas):
            return None
        return policy.Refusal("MemoryBudgetExceeded", f"the model {model.name!r} is larger than the pool", {})

    patch.setattr(policy, "too_large", wrong)


def outgrown(seed: int) -> None:
    """A model that takes more than its node has, by measurement, and more requests than it has slots."""
    spec = PoolSpec(
        models={"A": ModelSpec("A", num_gpus=1.0, memory_mib=1000)},
        nodes={"n": NodeSpec("n", gpus=1, memory_mib=1200)},
    )
    world = World(spec, lambda now: Ledger(spec, epoch="e1", now=now), seed=seed)
    world.memory_mib = {"A": 1250}
    for when in range(10):
        world.at(float(when), lambda: world.submit("A", 3.0))
    world.run()
    assert not world.crimes, world.crimes
    assert not any(each.rejected for each in world.requests.values())


def test_what_has_outgrown_its_node_serves_on() -> None:
    outgrown(0)


BUGS = [
    (serve_stops_whom_we_like, run),
    (what_serves_is_too_large, outgrown),
    (a_start_is_planned_once, test_spread.run),
    (the_newest_stops_on_any_node, test_spread.run),
]


@pytest.mark.parametrize(("plant", "simulate"), BUGS, ids=lambda each: each.__name__)
@pytest.mark.timeout(300)
def test_a_planted_bug_is_caught(
    plant: Callable[[pytest.MonkeyPatch], None], simulate: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    # A move that the table of transitions does not have raises, too.
    with pytest.raises((AssertionError, KeyError)):
        for seed in range(SEEDS):
            simulate(seed)
