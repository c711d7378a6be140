"""Who is told at once that he cannot be served could not have been, and nobody is told so only when it is too late.

Each pool is run twice: as it is, and with the refusals written down but not carried out, so that what would have become
of each is seen. Loads of one model differ by a factor of two.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from cluster.ledger.books.pool import Pool
from cluster.ledger.books.records import Waiter
from cluster.ledger.events import Command, LoadEngine, Reject
from cluster.ledger.handlers import requests
from cluster.ledger.ledger import Ledger
from cluster.ledger.rules import deadlines, estimate
from cluster.ledger.specs import ModelSpec, NodeSpec, PoolSpec
from tests.sim.world import Faults, Process, World

SEEDS = 40
END_S = 300.0
SPREAD = 1.0 / 3.0


def pool(seed: int, kind: type[World] = World) -> World:
    """Three models on one or two devices, and clients of whom many will not wait for a load."""
    rng = random.Random(seed)
    models = {
        name: ModelSpec(name, slots=rng.randint(1, 3), num_gpus=1.0, idle_timeout_s=rng.choice((2.0, 30.0)))
        for name in "ABC"
    }
    spec = PoolSpec(
        models=models, nodes={"n": NodeSpec("n", gpus=rng.randint(1, 2))}, max_asleep=rng.choice((0, None, None))
    )
    load_s = {name: rng.uniform(3.0, 15.0) for name in models}
    faults = Faults(load_spread=SPREAD, cancels=rng.choice((0.0, 0.2)))
    world = kind(spec, lambda now: Ledger(spec, epoch="e1", now=now), seed=seed, load_s=load_s, faults=faults)
    now = 0.0
    while (now := now + rng.expovariate(0.3)) < END_S:
        model, service_s, timeout_s = rng.choice("ABC"), rng.uniform(0.5, 4.0), rng.choice((1.0, 3.0, 8.0, 20.0, 60.0))
        world.at(now, lambda m=model, s=service_s, t=timeout_s: world.submit(m, s, timeout_s=t))
    return world


def test_who_is_refused_at_once_could_not_have_been_served() -> None:
    refused = 0
    for seed in range(SEEDS):
        named: dict[str, float] = {}

        def note(books: Pool, waiter: Waiter, now: float, named: dict[str, float] = named) -> None:
            if waiter.deadline <= deadlines.ready_after(books, waiter.model):
                named[waiter.request] = now

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(requests, "_too_late", note)
            world = pool(seed)
            world.run()
        served = [name for name in named if world.requests[name].granted is not None]
        assert not served, f"they would have been refused: {served}; seed {seed}"
        refused += len(named)
    assert refused > 100, "nobody was refused, so nothing was shown"


class Watched(World):
    """Sees who is timed out while the only engines of his model load, and are certain to go on."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.begun: dict[str, float] = {}
        self.took: dict[str, list[float]] = {}

    def _load(self, order: LoadEngine) -> None:
        super()._load(order)
        self.begun[order.replica] = self.now

    def _ready(self, process: Process) -> None:
        if process.state == "loading":
            self.took.setdefault(process.model, []).append(self.now - self.begun[process.uid])
        super()._ready(process)

    def _obey(self, command: Command) -> None:
        if isinstance(command, Reject) and command.error == "BackendTimeout":
            model = self.requests[command.request].model
            there = [each for each in self.processes.values() if each.model == model]
            took = self.took.get(model, [])
            if len(took) >= deadlines.ENOUGH_LOADS and there and all(each.state == "loading" for each in there):
                certain = min(self.begun[each.uid] for each in there) + deadlines.SHARE * min(took)
                assert self.now > certain - 1e-6, f"{command.request} waited in vain for {there}"
        super()._obey(command)


def test_nobody_waits_in_vain_for_a_load_that_is_certain_to_take_longer() -> None:
    told = 0
    for seed in range(SEEDS):
        world = pool(seed, Watched)
        world.run()
        told += sum(each.rejected == "QueueFull" for each in world.requests.values())
    assert told > 100, "nobody was told, so nothing was shown"


Bug = Callable[[pytest.MonkeyPatch], None]


def guesses_refuse(patch: pytest.MonkeyPatch) -> None:
    """Who would probably not be served in time is refused."""

    def wrong(books: Pool, model: object) -> float:
        return books.now + estimate.wait_s(books, model, 2, books.now)  # type: ignore[arg-type]

    patch.setattr(deadlines, "ready_after", wrong)


def nobody_is_told(patch: pytest.MonkeyPatch) -> None:
    """Whoever cannot be served hears of it when his time is over."""
    patch.setattr(requests, "_too_late", lambda books, waiter, now: None)


BUGS = {
    guesses_refuse: test_who_is_refused_at_once_could_not_have_been_served,
    nobody_is_told: test_nobody_waits_in_vain_for_a_load_that_is_certain_to_take_longer,
}


@pytest.mark.parametrize("plant", BUGS, ids=lambda each: each.__name__)
def test_a_planted_bug_is_found_out(plant: Bug, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        BUGS[plant]()
