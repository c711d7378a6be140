"""Proof that the simulation would notice if the ledger were wrong, in ways that the state machine's pool cannot show.

Each of these is a mistake that a ledger has made, as a patch of one function, and must be caught within 100 seeds.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cluster.ledger.books import packing, pool, records
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
HIGH = 1


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


def rays_packing_is_no_matter(patch: pytest.MonkeyPatch) -> None:
    """What starts beside promised room by the ledger's books starts, though Ray will book it right there."""
    patch.setattr(packing.RayBooks, "breaks", lambda *_: False)


def promised(seed: int) -> None:
    """F is promised a whole device, half of which is free; d fits beside it, and Ray would start it on that half."""
    half = {name: ModelSpec(name, num_gpus=0.5, pinned=name == "y") for name in "wxy"}
    spec = PoolSpec(
        models={**half, "F": ModelSpec("F", num_gpus=1.0), "d": ModelSpec("d", num_gpus=0.4)},
        nodes={"n": NodeSpec("n", gpus=2, cpus=8.0)},
        bound_s=(5.0, 8.0, 12.0),
        load_prior_s=0.0,
    )
    world = World(spec, lambda now: Ledger(spec, epoch="e1", now=now), seed=seed, load_s=0.2)
    # w, then x on the same device, as Ray packs them, then y on the other; only x goes on for long.
    for when, model, service_s in ((0.0, "w", 3.5), (1.0, "x", 14.0), (2.0, "y", 1.0)):
        world.at(when, lambda m=model, s=service_s: world.submit(m, s, priority=HIGH))  # type: ignore[misc]
    world.at(5.0, lambda: world.submit("F", 1.0, priority=HIGH))
    world.at(12.0, lambda: world.submit("d", 60.0))
    world.run()
    assert not world.crimes, world.crimes
    waits = {each.model: each.wait_s for each in world.requests.values()}
    assert waits["F"] is not None
    assert waits["F"] < 15.0, f"F has waited for {waits['F']} s, and x was done after 10"


def test_promised_room_is_kept_from_what_ray_would_start_there() -> None:
    promised(0)


BUGS = [
    (serve_stops_whom_we_like, run),
    (what_serves_is_too_large, outgrown),
    (a_start_is_planned_once, test_spread.run),
    (the_newest_stops_on_any_node, test_spread.run),
    (rays_packing_is_no_matter, promised),
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
