"""Who cannot be served before his deadline, for certain: he is told at once, and not when it has passed.

No estimate is good enough to send somebody away, so this is a lower bound. A request for a model M with the deadline d
is refused where all of this is true:

* nothing of M could serve it any moment: no replica of M is READY, or DRAINING and may be opened again, no engine of M
  sleeps or wakes, and no server offers M;
* an engine of M was ordered to load, by this life of the ledger, at the time b; and
* d <= b + SHARE * f, where f is the shortest of at least two loads of M by its present configuration.

All that others may change counts as nothing: lines, streams, turns, drains, back-offs. Whoever stands before it may
leave, a stream may end, a victim may fall idle, an operator may step in. A load is all that nobody can shorten. It need
not take as long as the shortest before it, for files may be in memory now that had to be read, hence the share.

While no engine loads, who wants M waits, though its load alone may take longer than he will: his wait is what has it
loaded. Were he sent away, M would never come for those who are patient for less than a load, not even when they ask
again. Once it loads, it does so without him, and `Retry-After` says when it will be there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.ledger.books.queue import INFINITY
from cluster.ledger.states import ReplicaState

if TYPE_CHECKING:
    from cluster.ledger.books.pool import Pool
    from cluster.ledger.books.records import Model

LOADING, READY, DRAINING = ReplicaState.LOADING, ReplicaState.READY, ReplicaState.DRAINING

# A load takes at least this much of the shortest one that was seen, of so many.
SHARE = 0.5
ENOUGH_LOADS = 2


def ready_after(pool: Pool, model: Model) -> float:
    """No replica of a model is ready before this; minus infinity if one may be any moment, for all that is certain."""
    if model.loads_seen < ENOUGH_LOADS or model.counts[READY] or model.counts[DRAINING]:
        return -INFINITY
    # One that is not ordered to load yet will take its whole time from now on, so it is not the first.
    loading = [each for each in model.in_state(LOADING) if each.order_due == INFINITY]
    # What a former life has ordered began nobody knows when, and an engine that sleeps is there in a moment.
    if not all(each.ordered and not each.wakes for each in loading) or model.sleeping:
        return -INFINITY
    if pool.servers.offers(model.name):
        return -INFINITY
    return min((each.order_began for each in loading), default=-INFINITY) + SHARE * model.fastest_load_s
