"""Seeded simulations of whole pools with everything going wrong, and what must be true all the same.

While faults rage, the invariants hold after every single event. When they stop, every request comes to an end, no
lease is left, and an idle pool can be emptied: nothing is pinned by a count that leaked. A failure prints its seed.
The budget is 1,000 seeds; `tests/stateful/test_fuzz.py` goes on without one.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from cluster.ledger.events import ConfigChanged, LoadRequested, UnloadRequested
from cluster.ledger.ledger import Ledger
from cluster.ledger.specs import ModelSpec, NodeSpec, PoolSpec
from tests.sim.world import Faults, World

SEEDS = 1000


def draw_spec(rng: random.Random) -> PoolSpec:
    """A pool: one to three nodes, two to six models of all kinds."""
    head = rng.choice((0, 0, 1, 9))
    node_mib, device_mib = rng.choice(((0, 0), (3000, 0), (3000, 0), (0, 1100), (3000, 1100)))
    nodes = {
        f"n{index}": NodeSpec(
            f"n{index}",
            gpus=rng.randint(1, 3),
            cpus=8.0,
            memory_mib=node_mib,
            is_head=index == head,
            device_memory_mib=device_mib,
            host_memory_mib=rng.choice((0, 4 * 2000)),
        )
        for index in range(rng.randint(1, 3))
    }
    shares = rng.random() < 0.3
    models = {}
    for name in "ABCDEF"[: rng.randint(2, 6)]:
        models[name] = ModelSpec(
            name,
            slots=rng.randint(1, 4),
            num_gpus=rng.choice((0.0, 0.5, 0.5, 1.0, 1.0, 1.0)),
            num_cpus=rng.choice((0.0, 1.0)),
            memory_mib=rng.choice((0, 500, 1000)),
            min_replicas=rng.choice((0, 0, 0, 1)),
            max_replicas=rng.randint(1, 3),
            max_queued=rng.choice((None, None, 5)),
            idle_timeout_s=rng.choice((0.0, 2.0, 20.0)),
            load_timeout_s=8.0,
            preload=rng.random() < 0.1,
            fallbacks=rng.choice(((), (), ("A",))),
            group=rng.choice((None, None, "g")),
            sleep_level=rng.choice((0, 1, 2)),
            group_share=shares,
            devices=rng.choice(((), (), (), ("0",))),
        )
    return PoolSpec(
        models=models,
        nodes=nodes,
        capacity=rng.choice((0, 0, 2)),
        queue_max_size=rng.choice((20, 100)),
        variants={"public": (("A", 2.0), ("B", 1.0))},
        drain_timeout_s=60.0,
        max_asleep=rng.choice((0, 0, None, 2)),
        asleep_device_mib=200,
    )


def draw_faults(rng: random.Random) -> Faults:
    """A different mixture of trouble each time, sometimes none at all."""
    if rng.random() < 0.15:
        return Faults()

    def maybe(value: float) -> float:
        return value if rng.random() < 0.5 else 0.0

    return Faults(
        late_s=maybe(0.2),
        twice=maybe(0.1),
        load_fails=maybe(0.2),
        load_hangs=maybe(0.1),
        never_starts=maybe(0.1),
        dies_after_s=maybe(20.0),
        wrong_victim=maybe(0.3),
        engine_dies_after_s=maybe(15.0),
        engine_hangs=maybe(0.05),
        unload_hangs=maybe(0.05),
        sleep_fails=maybe(0.1),
        sleep_hangs=maybe(0.05),
        wake_fails=maybe(0.2),
        wake_hangs=maybe(0.05),
        loses=maybe(0.2),
        cancels=maybe(0.2),
        load_spread=0.5,
    )


def simulate(seed: int) -> World:
    rng = random.Random(seed)
    spec, faults = draw_spec(rng), draw_faults(rng)

    def check(world: World) -> None:
        world.scheduler.check()  # type: ignore[attr-defined]

    def new(now: float) -> Ledger:
        return Ledger(spec, epoch="e1", now=now)

    def again(now: float) -> Ledger:
        # Made with what it was first started with, it hears of the present configuration from an ingress.
        world.at(now + arrives_s, lambda: world.post(ConfigChanged(world.spec)))
        old = replace(spec, models={"A": replace(spec.models["A"], revision="old")})
        return Ledger(old, epoch="e2", now=now, recovering_until=now + 2.0, configured=False)

    world = World(spec, new, seed=seed, load_s=rng.uniform(0.2, 3.0), faults=faults, after_step=check)
    world.spec = spec
    world.asleep_mib = {name: (rng.choice((50, 800)), rng.choice((0, 50, 150, 300))) for name in spec.models}
    world.others.update(rng.choices(list(spec.nodes), k=rng.randint(0, 3)))
    arrives_s = rng.choice((0.5, 5.0))
    names = [*spec.models, "public", "nonsense"]
    now = 0.0
    for _ in range(rng.randint(20, 120)):
        now += rng.expovariate(rng.choice((0.5, 2.0, 10.0)))
        model, service_s = rng.choice(names), rng.expovariate(1.0)
        priority, holder = rng.randint(1, 3), f"h{rng.randint(1, 3)}"
        timeout_s = rng.choice((2.0, 30.0, 100.0))
        slots = rng.choice((1, 1, 1, 2, 5))
        world.at(now, _submit(world, model, service_s, priority, holder, timeout_s, slots))
    if rng.random() < 0.3:
        world.at(now * rng.random(), lambda: world.kill_holder("h3"))
    if rng.random() < 0.3:
        world.at(now * rng.random(), lambda: world.restart(again))
    if rng.random() < 0.3:
        world.at(now * rng.random(), lambda: world.tell(UnloadRequested("A")))
    if rng.random() < 0.3:
        world.at(now * rng.random(), lambda: world.tell(LoadRequested("B", rng.randint(1, 3))))
    for turn in range(1, 20):
        world.at(now * turn / 20, world.announce_holders)
    if rng.random() < 0.5:
        factor = {name: rng.choice((0.8, 1.2, 4.0, 4.0)) for name in spec.models}
        # What fits on no device, or no node, is refused where it comes; who waits for it already waits until his
        # deadline.
        world.memory_mib = {name: round(each.memory_mib * factor[name]) for name, each in spec.models.items()}
        if any(each.device_memory_mib for each in spec.nodes.values()):
            most = {name: 1100 * max(1, round(each.num_gpus)) for name, each in spec.models.items() if each.num_gpus}
            world.memory_mib |= {name: min(mib, world.memory_mib[name]) for name, mib in most.items()}
        if node_mib := max(each.memory_mib for each in spec.nodes.values()):
            world.memory_mib = {name: min(mib, node_mib) for name, mib in world.memory_mib.items()}
    if rng.random() < 0.3:
        name = rng.choice(list(spec.models))
        changed = replace(spec.models[name], slots=rng.randint(1, 4), revision=rng.choice(("", "new")))
        world.at(now * rng.random(), lambda: _reconfigure(world, changed))
    world.run(until=now)
    # The faults stop; what is under way goes on.
    world.faults = Faults()
    world.at(now + 1.0, world.announce_holders)
    world.run(until=now + 400.0, max_steps=20_000)
    return world


def _submit(
    world: World, model: str, service_s: float, priority: int, holder: str, timeout_s: float, slots: int
) -> Any:
    def submit() -> None:
        if holder not in world.dead_holders:
            world.submit(model, service_s, priority=priority, holder=holder, timeout_s=timeout_s, slots=slots)

    return submit


def _reconfigure(world: World, changed: ModelSpec) -> None:
    world.spec = replace(world.spec, models={**world.spec.models, changed.name: changed})
    world.tell(ConfigChanged(world.spec))


def judge(world: World) -> None:
    """What must be true at the end of every run."""
    ledger = world.scheduler
    assert isinstance(ledger, Ledger)
    ledger.check()
    assert not world.crimes, world.crimes
    assert not world.cut, world.cut
    state = ledger.snapshot()
    assert state.queued == 0, f"somebody waits for ever: {state}"
    assert state.leases == 0, f"a lease leaked: {state}"
    open_requests = [each.name for each in world.requests.values() if not each.done]
    assert not open_requests, f"never answered: {open_requests}"
    # Everything idle can be reached: an operator empties the pool.
    for name in world.spec.models:
        world.tell(UnloadRequested(name))
    world.run(until=world.now + 60.0)
    # Where replicas stay, a process that Serve was asked for and has not started yet is one of them.
    stays = world.spec.max_asleep != 0
    left = [each for each in ledger.snapshot().replicas if each.state != "ASLEEP" and (each.replica or not stays)]
    assert not left, f"something cannot be unloaded: {ledger.snapshot()}"
    asleep = {each.replica for each in ledger.snapshot().replicas if each.replica}
    assert not asleep or world.spec.max_asleep != 0, f"they sleep: {asleep}"
    alive = {each.uid for each in world.processes.values() if each.state != "pending"}
    assert alive == asleep, f"{alive} live and {asleep} are known: a process was forgotten"


def run(seed: int) -> None:
    try:
        judge(simulate(seed))
    except BaseException:
        print(f"\nsimulation failed: seed {seed}")
        raise


@pytest.mark.parametrize("block", range(10))
def test_pools_survive_everything(block: int) -> None:
    for seed in range(block * SEEDS // 10, (block + 1) * SEEDS // 10):
        run(seed)


def test_a_seed_reproduces_a_run() -> None:
    one, other = simulate(11), simulate(11)
    assert one.steps == other.steps
    assert repr(one.scheduler) == repr(other.scheduler)
    assert [each.granted for each in one.requests.values()] == [each.granted for each in other.requests.values()]
