"""When the first in line for a place must get it, so that everybody behind it keeps its bound, too.

Several models that wait at once are let in one after the other. Each of them alone would have its place in time if the
drain began at its own bound (`policy.bound_at`), but then only the first does: the next waits for its swap and its
work, the third for those of two. So the line is looked at as a whole. With w(i) for the swap and the work of the i-th
in line and n for the places that are given out side by side, the first drain begins no later than

    min over i of  bound_at(i) - LEAD * (w(1) + … + w(i-1)) / n

Nothing here changes the state.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

from cluster.ledger.rules import policy

if TYPE_CHECKING:
    from cluster.ledger.books.pool import Pool
    from cluster.ledger.books.records import Model

# Of a longer line the end is not looked at, and no more places are counted.
MAX_LINE = 16
MAX_PLACES = 32


def due_at(pool: Pool, model: Model, now: float) -> float:
    """When a drain must begin for a model: for the sake of its own waiters and, if it is first in line, of the rest."""
    due = policy.bound_at(pool, model)
    if pool.pending_count < 2:
        return due
    line = [each for each in pool.best_pending(MAX_LINE) if not each.serving]
    if not line or line[0] is not model:
        return due
    resident = [each for each in islice(pool.resident, MAX_PLACES) if not each.spec.pinned]
    # Side by side there is a place for as many as have one that they may lose, at least.
    share = policy.LEAD / max(1, len(resident))
    # Who was never served is taken to need as long as those who were.
    prior_s = max((each.service_s for each in resident), default=0.0)
    ahead_s = 0.0
    for each in line:
        due = min(due, policy.bound_at(pool, each) - share * ahead_s)
        ahead_s += stay_s(pool, each, now) + (0.0 if each.service_s else prior_s)
    return due


def stay_s(pool: Pool, model: Model, now: float) -> float:
    """How long a model that gets a place takes it away from others: its swap, and its work."""
    return policy.swap_cost(pool, model) + work_s(pool, model, now)


def work_s(pool: Pool, model: Model, now: float) -> float:
    """How long a model that has a place keeps it while others wait: until it is idle, or for its turn."""
    turn_s = pool.spec.turn_swaps * policy.swap_cost(pool, model)
    return min(policy.busy_time(model, now), max(turn_s, model.service_s))
