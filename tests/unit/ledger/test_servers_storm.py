"""Random events against external servers: the books hold, all is served in the end, and planted bugs are found."""

from __future__ import annotations

import dataclasses
import random

import pytest

from cluster.ledger.books import server_moves, servers
from cluster.ledger.events import (
    ConfigChanged,
    Grant,
    RequestCancelled,
)
from cluster.ledger.rules import server_turns
from cluster.ledger.specs import ServerSpec
from tests.unit.ledger.server_desk import Desk, refused


def storm(seed: int) -> None:
    """Hundreds of random events; the invariants are checked after each, and all that waits is served in the end."""
    rng = random.Random(seed)
    specs = tuple(ServerSpec(f"http://{n}", rng.randint(1, 3), rng.random() < 0.7) for n in range(3))
    desk = Desk(
        *specs, queue_max_size=30, bound_s=(1.0, 2.0, 4.0), server_batch_s=rng.choice((0.0, 0.5)), server_turn_s=0.5
    )
    models = [f"m{n}" for n in range(4)]
    waits: list[float] = []
    refusals = 0
    for number in range(400):
        desk.now += rng.expovariate(20.0)
        dice = rng.random()
        if dice < 0.45:
            out = desk.ask(f"r{number}", rng.choice(models), rng.randint(1, 3), rng.choice((0.5, 5.0, 50.0)))
        elif dice < 0.8 and desk.held:
            out = desk.done(rng.choice(list(desk.held)), after=0.0)
        elif dice < 0.87:
            name = f"r{rng.randrange(number + 1)}"
            desk.held.pop(name, None)
            out = desk.post(RequestCancelled(name))
        elif dice < 0.95:
            offer = rng.sample(models, rng.randint(1, 4)) if rng.random() < 0.8 else None
            out = desk.hear(rng.choice(specs).url, None if offer is None else " ".join(offer))
        else:
            changed = tuple(dataclasses.replace(each, max_concurrent=rng.randint(1, 3)) for each in specs)
            out = desk.post(ConfigChanged(dataclasses.replace(desk.spec, servers=changed[: rng.randint(2, 3)])))
        waits += [each.queue_wait_s for each in out if isinstance(each, Grant)]
        refusals += len(refused(out))
    desk.post(ConfigChanged(desk.spec))
    for spec in specs:
        desk.hear(spec.url, " ".join(models))
    while desk.ledger.snapshot().queued or desk.held:
        assert desk.held, "somebody waits for ever"
        desk.done(next(iter(desk.held)), after=0.1)
    snapshot = desk.ledger.snapshot()
    assert (snapshot.leases, snapshot.queued) == (0, 0)
    assert snapshot.submitted == snapshot.finished + snapshot.rejected
    assert waits


@pytest.mark.parametrize("seed", range(40))
def test_random_events_never_break_the_guard_and_end_in_order(seed):
    storm(seed)


def _no_guard(pool, server, now):
    return next((pool.models[name] for name in server.models if pool.models[name].queue.count), None)


def _no_turns(pool, server, now):
    waiting = (pool.models[name] for name in server.models if pool.models[name].queue.count)
    return next((model for model in waiting if server.last in (None, model.name)), None)


def _forgets_to_count(pool, lease):
    lease.server.take(lease, 0)


@pytest.mark.parametrize(
    ("where", "name", "bug"),
    [
        (server_turns, "next_model", _no_guard),
        (server_turns, "next_model", _no_turns),
        (servers.Server, "is_busy", property(lambda self: False)),
        (servers.Server, "is_up", property(lambda self: True, lambda self, value: None)),
        (server_moves, "hold", _forgets_to_count),
    ],
)
def test_the_random_events_find_planted_bugs(monkeypatch, where, name, bug):
    monkeypatch.setattr(where, name, bug)
    with pytest.raises((AssertionError, KeyError)):
        for seed in range(10):
            storm(seed)
