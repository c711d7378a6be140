"""Proof that the simulation would notice if the ledger were wrong, in ways that the state machine's pool cannot show.

Each of these is a mistake that a ledger has made, as a patch of one function, and must be caught within 100 seeds.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cluster.ledger.books import pool, records, stops
from cluster.ledger.handlers import starts
from cluster.ledger.rules import policy
from tests.sim import test_spread
from tests.sim.test_simulation import run
from tests.stateful.test_planted_bugs import serve_stops_whom_we_like

SEEDS = 100


def what_serves_is_too_large(patch: pytest.MonkeyPatch) -> None:
    """A model that was measured to take more than its node has is refused while it serves."""

    def wrong(books: pool.Pool, model: records.Model, replicas: int = 1) -> policy.Refusal | None:
        if books.book.could_ever_fit(model.shape, replicas):
            return None
        return policy.Refusal("MemoryBudgetExceeded", f"the model {model.name!r} is larger than the pool", {})

    patch.setattr(policy, "too_large", wrong)


def a_start_is_planned_once(patch: pytest.MonkeyPatch) -> None:
    """Ray starts one process where another was planned, which keeps its place there and can never start."""
    patch.setattr(starts, "replan", lambda *_, **__: None)


def the_newest_stops_on_any_node(patch: pytest.MonkeyPatch) -> None:
    """Serve is taken to stop the newest replica, as it does on one node only."""
    patch.setattr(stops, "may_go_before", lambda book, other, replica: other.age > replica.age)


BUGS = [
    (serve_stops_whom_we_like, run),
    (what_serves_is_too_large, run),
    (a_start_is_planned_once, test_spread.run),
    (the_newest_stops_on_any_node, test_spread.run),
]


@pytest.mark.parametrize(("plant", "simulate"), BUGS, ids=lambda each: each.__name__)
@pytest.mark.timeout(300)
def test_a_planted_bug_is_caught(
    plant: Callable[[pytest.MonkeyPatch], None], simulate: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        for seed in range(SEEDS):
            simulate(seed)
