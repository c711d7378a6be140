"""Several nodes, fractions of devices, groups, and processes that take their shares of Ray's books: nobody waits for a
start that Ray cannot make, whatever node and device it chooses for each.

Nothing goes wrong in this world but that. A failure prints its seed.
"""

from __future__ import annotations

import random

from cluster.ledger.ledger import Ledger
from cluster.ledger.specs import ModelSpec, NodeSpec, PoolSpec
from tests.sim.world import World

SEEDS = 60
END_S = 40.0


def spread(seed: int) -> World:
    """Four to seven models of all sizes on one to three nodes, which they nearly fill."""
    rng = random.Random(seed)
    head = rng.choice((0, 9))
    nodes = {
        f"n{index}": NodeSpec(f"n{index}", gpus=rng.randint(1, 2), cpus=8.0, is_head=index == head)
        for index in range(rng.choice((1, 2, 3, 3)))
    }
    models = {
        name: ModelSpec(
            name,
            slots=rng.randint(1, 3),
            num_gpus=rng.choice((0.3, 0.4, 0.5, 0.6, 1.0, 1.0)),
            num_cpus=rng.choice((0.0, 0.0, 3.0)),
            idle_timeout_s=rng.choice((0.0, 0.5, 2.0)),
            max_replicas=rng.choice((1, 1, 2)),
            load_timeout_s=8.0,
            group=rng.choice((None, None, "g")),
            devices=rng.choice(((), (), (), ("0",))),
        )
        for name in "ABCDEFG"[: rng.randint(4, 7)]
    }
    spec = PoolSpec(models=models, nodes=nodes, bound_s=(5.0, 10.0, 20.0), queue_max_size=1000)
    world = World(
        spec,
        lambda now: Ledger(spec, epoch="e1", now=now),
        seed=seed,
        load_s=rng.uniform(0.2, 2.0),
        after_step=lambda world: world.scheduler.check(),  # type: ignore[attr-defined]
    )
    world.others.update(rng.choices(list(nodes), k=rng.randint(0, 2)))
    now = 0.0
    while (now := now + rng.expovariate(1.0)) < END_S:
        model, service_s, priority = rng.choice(list(models)), 0.3 + rng.expovariate(0.25), rng.randint(1, 3)
        world.at(now, lambda m=model, s=service_s, p=priority: world.submit(m, s, priority=p))
    return world


def run(seed: int) -> None:
    world = spread(seed)
    # The others are larger than the pool, or bound to what it has not.
    able = {
        each.name
        for each in world.spec.models.values()
        if any(
            each.num_gpus <= (min(node.gpus, 1) if each.devices else node.gpus) for node in world.spec.nodes.values()
        )
    }
    try:
        world.run(max_steps=50_000)
        assert not world.crimes, world.crimes
        assert not world.cut, world.cut
        assert all(each.granted is not None for each in world.requests.values() if each.model in able), (
            "not all were served"
        )
    except AssertionError:
        print(f"\nspread failed: seed {seed}")
        raise


def test_nobody_waits_for_a_start_that_ray_cannot_make() -> None:
    for seed in range(SEEDS):
        run(seed)
