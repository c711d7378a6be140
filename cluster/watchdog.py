"""When is a pool stuck? Work waits, and nothing has moved for longer than any load may take.

Every wait in the ledger has an end: a load its timeout, a request its deadline, a back-off its pause. What has none is
a process that was told to stop and does not die, and a mistake of the scheduler itself. A pool in which streams run is
not stuck, however long the others wait: those have bounds of their own.
"""

from __future__ import annotations

from cluster.ledger.snapshot import Snapshot
from cluster.ledger.specs import PoolSpec

#: What is left to Serve for starting and stopping processes, in seconds, beyond the longest load.
SLACK_S = 5.0
#: The states in which something was told to end, and what.
ENDING = {"STOPPING": "a replica", "UNLOADING": "the engine of a replica"}


def limit_s(spec: PoolSpec) -> float:
    """For how long nothing may move while something waits, in seconds."""
    return max((model.load_timeout_s for model in spec.models.values()), default=0.0) + SLACK_S


def stalled(snapshot: Snapshot, moved_at: float, now: float, limit_s: float) -> str | None:
    """Why the pool is stuck, in words for a person, or None.

    `snapshot` is the ledger's own, `moved_at` when it last granted, took back, started, stopped or learned anything,
    `now` the time on the same clock.
    """
    waiting = {name: row for name, row in snapshot.models.items() if row.queued}
    if snapshot.recovering or not waiting:
        return None
    count = sum(row.queued for row in waiting.values())
    since = min(row.waiting_since for row in waiting.values() if row.waiting_since is not None)
    if now - since <= limit_s:
        return None
    who = f"{count} request(s) wait for {', '.join(sorted(waiting))}"
    for replica in snapshot.replicas:
        age = now - replica.since
        if replica.state in ENDING and age > limit_s:
            what = ENDING[replica.state]
            return f"{who}; {what} of {replica.model} was told to stop {age:.0f} s ago and has not ended"
    still = now - max(moved_at, since)
    if not snapshot.leases and still > limit_s:
        return f"{who}; nothing has moved for {still:.0f} s"
    return None
