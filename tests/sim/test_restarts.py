"""The ledger dies in a busy pool, and the next life of it cuts nothing, forgets nothing and gives nothing twice.

Everybody does as told, so whatever goes wrong is the ledger's. Its configuration changes about when it dies.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from cluster.ledger import ledger as front
from cluster.ledger.books.pool import Pool
from cluster.ledger.events import ConfigChanged, ReplicaStarted
from cluster.ledger.handlers import replicas
from cluster.ledger.ledger import Ledger
from cluster.ledger.specs import ModelSpec, NodeSpec, PoolSpec
from tests.sim.world import World
from tests.stateful import test_planted_bugs as planted

SEEDS = 60
WINDOW_S = 2.0


def check(world: World) -> None:
    """The ledger is sound, and once it decides it knows every stream."""
    ledger = world.scheduler
    assert isinstance(ledger, Ledger)
    ledger.check()
    if ledger.is_recovering:
        return
    running = {each.name for each in world.requests.values() if each.granted is not None and not each.done}
    known = set(ledger._pool.leases)
    assert running <= known, f"{world.now}: {running - known} run, and the ledger does not know of them"


def life(seed: int) -> World:
    rng = random.Random(seed)
    models = {
        name: ModelSpec(
            name, slots=rng.randint(1, 4), num_gpus=rng.choice((0.5, 1.0)), max_replicas=2, idle_timeout_s=1.0
        )
        for name in "AB"
    }
    spec = PoolSpec(
        models=models,
        nodes={"n": NodeSpec("n", gpus=rng.randint(2, 3))},
        max_asleep=rng.choice((0, None)),
        upscale_wait_s=0.5,
    )
    world = World(spec, lambda now: Ledger(spec, epoch="e1", now=now), seed=seed, load_s=0.5, after_step=check)
    # Serve hears late of whom it is to stop, or what it stops takes its time.
    world.loop_s, world.stop_s = rng.choice((0.1, 1.0)), rng.choice((0.2, 6.0))
    changed = {
        name: replace(each, slots=rng.randint(1, 4), revision=rng.choice(("", "new"))) for name, each in models.items()
    }
    if rng.random() < 0.4:
        changed = models
    dies, told, waits = rng.uniform(5.0, 40.0), rng.choice((True, False)), rng.choice((True, False))

    def configure() -> None:
        world.spec = replace(spec, models=changed)
        world.tell(ConfigChanged(world.spec))

    def again(now: float) -> Ledger:
        # Perhaps it was changed while there was no ledger.
        world.spec = replace(spec, models=changed)
        return Ledger(world.spec, epoch="e2", now=now, recovering_until=now + WINDOW_S)

    def die() -> None:
        # Best just when Serve stops a process.
        if waits and world.now < dies + 15.0 and not any(each.state == "stopping" for each in world.processes.values()):
            world.at(world.now + 0.1, die)
        else:
            world.restart(again)

    now = 0.0
    while (now := now + rng.expovariate(0.6)) < 60.0:
        # One long stream now and then, so that of two replicas any may be idle first.
        model, service_s = rng.choice("AAB"), rng.choice((1.0, 2.0, 4.0, 25.0))
        world.at(now, lambda m=model, s=service_s: world.submit(m, s))
    if told:
        world.at(dies - rng.choice((0.05, 0.5, 3.0)), configure)
    world.at(dies, die)
    return world


def test_a_new_life_of_the_ledger_costs_nobody_anything() -> None:
    for seed in range(SEEDS):
        world = life(seed)
        try:
            world.run(max_steps=50_000)
            assert not world.crimes, world.crimes
            assert not world.cut, world.cut
            assert all(each.done and not each.rejected for each in world.requests.values()), "somebody was never served"
        except AssertionError:
            print(f"\na restart did harm: seed {seed}")
            raise


def who_is_told_to_stop_serves_on(patch: pytest.MonkeyPatch) -> None:
    """A replica that Serve stops gets requests, as in a new life that does not know whom Serve was told to stop."""
    right = replicas.replica_started

    def wrong(books: Pool, event: ReplicaStarted, now: float) -> None:
        right(books, event._replace(stopping=False), now)

    patch.setitem(front._HANDLERS, ReplicaStarted, wrong)


BUGS = (
    planted.slots_of_a_former_life_are_forgotten,
    planted.ages_of_a_former_life_are_forgotten,
    who_is_told_to_stop_serves_on,
)


@pytest.mark.parametrize("plant", BUGS, ids=lambda each: each.__name__)
def test_a_planted_bug_is_found_out(
    plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        test_a_new_life_of_the_ledger_costs_nobody_anything()
