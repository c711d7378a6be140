"""Small contended pools in a perfect world: the policy keeps its promises, and a policy that does not is found out.

Each planted bug is a rule of the policy left out, as a patch of one function. A failure prints its seed.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from cluster.ledger import placing
from cluster.ledger.ledger import Ledger
from cluster.ledger.specs import ModelSpec, NodeSpec, PoolSpec
from tests.sim.promises import Judge
from tests.sim.world import World

SEEDS = 150
END_S = 150.0


def contest(seed: int) -> World:
    """Three to five models on one or two devices, all classes, streams of half a second to a minute."""
    rng = random.Random(seed)
    models = {
        name: ModelSpec(
            name, slots=rng.randint(1, 3), num_gpus=rng.choice((0.5, 1.0, 1.0)), idle_timeout_s=0.0, max_replicas=1
        )
        for name in "ABCDE"[: rng.randint(3, 5)]
    }
    nodes = {"n": NodeSpec("n", gpus=rng.randint(1, 2))}
    spec = PoolSpec(models=models, nodes=nodes, bound_s=(5.0, 10.0, 20.0))
    load_s = {name: rng.uniform(0.5, 4.0) for name in models}
    world = World(spec, lambda now: Ledger(spec, epoch="e1", now=now), seed=seed, load_s=load_s, after_step=Judge())
    now = 0.0
    while (now := now + rng.expovariate(0.25)) < END_S:
        model, service_s, priority = rng.choice(list(models)), 0.5 + rng.expovariate(0.2), rng.randint(1, 3)
        if rng.random() < 0.1:
            service_s = 60.0
        world.at(now, lambda m=model, s=service_s, p=priority: world.submit(m, s, priority=p))
    return world


def run(seed: int) -> None:
    world = contest(seed)
    try:
        world.run(max_steps=50_000)
        assert not world.crimes, world.crimes
        assert not world.cut, world.cut
        assert all(each.done for each in world.requests.values()), "somebody was never served"
    except AssertionError:
        print(f"\npromises broken: seed {seed}")
        raise


def test_the_policy_keeps_its_promises() -> None:
    for seed in range(SEEDS):
        run(seed)


def claims_are_vows(patch: pytest.MonkeyPatch) -> None:
    """Who was promised the room of a busy model waits for that, whoever becomes idle."""
    patch.setattr(placing, "_replan", lambda *_: None)


def a_lower_class_keeps_its_promise(patch: pytest.MonkeyPatch) -> None:
    """The room of a victim goes to whom it was promised first, whoever of a higher class waits meanwhile."""
    patch.setattr(placing, "_take_over", lambda *_: False)


@pytest.mark.parametrize("plant", [claims_are_vows, a_lower_class_keeps_its_promise], ids=lambda each: each.__name__)
def test_a_broken_promise_is_found_out(
    plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        test_the_policy_keeps_its_promises()
