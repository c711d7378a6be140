"""Small contended pools in a perfect world: the policy keeps its promises, and a policy that does not is found out.

Each planted bug is a rule of the policy left out, as a patch of one function. A failure prints its seed.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from cluster.ledger import placing
from cluster.ledger.books import queue
from cluster.ledger.ledger import Ledger
from cluster.ledger.rules import crowd, policy, victims
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


def burst(seed: int) -> None:
    """Two models take turns on one device and keep up, a crowd comes to both, and in the end they keep up again."""
    rng = random.Random(seed)
    models = {name: ModelSpec(name, slots=4, num_gpus=1.0, idle_timeout_s=0.0) for name in "AB"}
    spec = PoolSpec(
        models=models, nodes={"n": NodeSpec("n", gpus=1)}, queue_max_size=10_000, bound_s=(30.0, 60.0, 120.0)
    )
    world = World(spec, lambda now: Ledger(spec, epoch="e1", now=now), seed=seed, load_s=rng.uniform(7.0, 8.5))
    for name in models:
        now = 0.0
        while (now := now + rng.expovariate(0.25)) < 900.0:
            world.at(now, lambda m=name: world.submit(m, rng.uniform(3.0, 6.0)))
        for _ in range(45):
            world.at(150.0, lambda m=name: world.submit(m, rng.uniform(3.0, 6.0)))
    world.run(until=900.0)
    waiting = sum(each.granted is None for each in world.requests.values())
    assert waiting < 45, f"the pool never got over a burst: {waiting} wait; seed {seed}"


def test_a_burst_is_got_over() -> None:
    for seed in range(5):
        burst(seed)


def impatience(seed: int) -> None:
    """A flood on one model; who wants the other waits for half a minute and no longer: he is served by then."""
    rng = random.Random(seed)
    models = {name: ModelSpec(name, slots=16, num_gpus=1.0, idle_timeout_s=0.0) for name in "AB"}
    spec = PoolSpec(models=models, nodes={"n": NodeSpec("n", gpus=1)}, bound_s=(30.0, 60.0, 120.0))
    world = World(spec, lambda now: Ledger(spec, epoch="e1", now=now), seed=seed, load_s=rng.uniform(1.0, 4.0))
    now = 0.0
    while (now := now + rng.expovariate(2.0)) < 400.0:
        world.at(now, lambda: world.submit("A", rng.uniform(3.0, 6.0)))
    for when in range(40, 400, 32):
        world.at(when + rng.random(), lambda: world.submit("B", rng.uniform(2.0, 4.0), timeout_s=30.0))
    world.run()
    refused = [each for each in world.requests.values() if each.rejected]
    assert len(refused) <= 1, f"{len(refused)} impatient requests were not served; seed {seed}"


def test_the_impatient_are_served() -> None:
    for seed in range(5):
        impatience(seed)


def visit(seed: int) -> None:
    """A flood on one model, and five visitors at once, each to a model of his own: the bound of each is kept."""
    rng = random.Random(seed)
    models = {name: ModelSpec(name, slots=8, num_gpus=1.0, idle_timeout_s=0.0) for name in "ABCDEF"}
    spec = PoolSpec(models=models, nodes={"n": NodeSpec("n", gpus=1)}, bound_s=(30.0, 60.0, 120.0))
    world = World(spec, lambda now: Ledger(spec, epoch="e1", now=now), seed=seed, load_s=rng.uniform(4.0, 6.0))
    for index in range(200):
        world.at(1.2 * index + rng.random(), lambda: world.submit("A", rng.uniform(3.0, 6.0)))
    for name in "BCDEF":
        world.at(100.0 + rng.random(), lambda m=name: world.submit(m, rng.uniform(1.0, 4.0)))
    world.run()
    waits = {each.model: each.wait_s or 0.0 for each in world.requests.values() if each.model != "A"}
    assert max(waits.values()) <= 60.0, f"five visitors waited {waits}; seed {seed}"


def test_five_visitors_have_a_turn_each_within_their_bound() -> None:
    for seed in range(5):
        visit(seed)


Bug = Callable[[pytest.MonkeyPatch], None]


def claims_are_vows(patch: pytest.MonkeyPatch) -> None:
    """Who was promised the room of a busy model waits for that, whoever becomes idle."""
    patch.setattr(placing, "_replan", lambda *_: None)


def a_lower_class_keeps_its_promise(patch: pytest.MonkeyPatch) -> None:
    """The room of a victim goes to whom it was promised first, whoever of a higher class waits meanwhile."""
    patch.setattr(placing, "_take_over", lambda *_: False)


def swaps_after_every_batch(patch: pytest.MonkeyPatch) -> None:
    """Where everybody is overdue, the place goes from one to the other as soon as it can."""
    patch.setattr(policy, "turn_s", lambda pool, model: 0.0)
    right = victims.Verdict.__init__

    def wrong(self: victims.Verdict, *args: Any) -> None:
        right(self, *args)
        self.first_since = queue.INFINITY

    patch.setattr(victims.Verdict, "__init__", wrong)


def deadlines_are_no_bounds(patch: pytest.MonkeyPatch) -> None:
    """Who would wait for less than his class's bound is let in when he has gone."""
    patch.setattr(queue.WaitQueue, "first_deadline", lambda self: queue.INFINITY)


def each_bound_stands_alone(patch: pytest.MonkeyPatch) -> None:
    """Of several who wait, only the first has his place in time: nobody counts those who come before."""
    patch.setattr(crowd, "due_at", lambda pool, model, now: policy.bound_at(pool, model))


BUGS = {
    claims_are_vows: test_the_policy_keeps_its_promises,
    a_lower_class_keeps_its_promise: test_the_policy_keeps_its_promises,
    swaps_after_every_batch: test_a_burst_is_got_over,
    deadlines_are_no_bounds: test_the_impatient_are_served,
    each_bound_stands_alone: test_five_visitors_have_a_turn_each_within_their_bound,
}


@pytest.mark.parametrize("plant", BUGS, ids=lambda each: each.__name__)
def test_a_planted_bug_is_found_out(plant: Bug, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        BUGS[plant]()
