"""When a promise of room is worth to be replaced: a claim is a plan, not a vow.

A claim waits for its victims. Meanwhile another model may become idle, on this node or another, and a victim's stream
or stop may take far longer than was thought. So it is compared with what would be chosen now.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.ledger.books.queue import INFINITY
from cluster.ledger.rules.policy import Plan, Tier, drain_time
from cluster.ledger.states import ReplicaState

if TYPE_CHECKING:
    from cluster.ledger.books.pool import Pool
    from cluster.ledger.books.records import Claim, Replica

DRAINING = ReplicaState.DRAINING

# A stop that takes this long, and this many times what stops took so far, hangs.
STOP_PATIENCE_S = 5.0
STOP_PATIENCE = 4.0

# Another busy victim must be gone in so much less time. What a drain has left is taken to be at least what its oldest
# stream has lasted, so a claim changes its mind after 1, 3, 9, … times as long, and comes to an end with any of them.
CHEAPER = 3.0

# The first look for a busy victim that leaves sooner; the next come when the claim is twice as old each time.
FIRST_LOOK_S = 1.0


def slow(pool: Pool, claim: Claim, now: float) -> list[Replica]:
    """The victims that will not be gone in a moment: they have streams to end, or their stop hangs."""
    patience = max(STOP_PATIENCE_S, STOP_PATIENCE * pool.stop_s)
    found = {each for each in claim.victims if each.leases or now >= each.since + patience}
    # One that has drained waits for those that Serve would stop in its stead.
    held_up = {each.model for each in found if each.state is DRAINING}
    return [each for each in claim.victims if each in found or (each.state is DRAINING and each.model in held_up)]


def is_cheaper(pool: Pool, plans: list[Plan], victims: list[Replica], now: float) -> bool:
    """These plans rather than to wait for those victims, which are slow: idle ones always, others if it takes less."""
    if all(plan.tier <= Tier.IDLE for plan in plans):
        return True
    sooner = max(left_s(pool, each, now) for plan in plans for each in plan.victims)
    return CHEAPER * sooner < max(left_s(pool, each, now) for each in victims)


def left_s(pool: Pool, replica: Replica, now: float) -> float:
    """How long a victim will take to be gone, from now on: what a drain lasts, and no less than it has lasted."""
    if replica.state.is_leaving:
        return INFINITY
    oldest = max((now - lease.granted_at for lease in replica.leases), default=0.0)
    return pool.stop_s + max(oldest, drain_time(replica.model, len(replica.leases)))


def look_at(pool: Pool, claim: Claim) -> float:
    """When to look for another way though nothing became idle; never if all that could leave does."""
    return claim.look_at if len(pool.replicas) > len(claim.victims) else INFINITY


def next_look(claim: Claim, now: float) -> float:
    return now + max(FIRST_LOOK_S, now - claim.began)
