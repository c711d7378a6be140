"""What a restarted ledger hears before it knows the newest configuration: kept in order, and told to it afterwards.

The specification that it was made with may be older than what its replicas run: to judge them by it would drain what
is up to date, refuse requests for models that were registered since, and forget their replicas.
"""

from __future__ import annotations

from cluster.ledger.books.pool import Pool
from cluster.ledger.books.queue import INFINITY
from cluster.ledger.events import Event, NodesChanged, RequestArrived, RequestCancelled, Ticked

#: For how long a ledger without a configuration listens beyond its recovery window, in seconds.
PATIENCE_S = 30.0
#: For how long it goes on listening once it is configured: other holders of leases may be as late as the first.
GRACE_S = 1.0
# More requests than this are not kept; they are refused, and may come again.
MAX_EVENTS = 100_000


def await_configuration(pool: Pool, patience_s: float) -> None:
    """From now on keep what is heard, until a `ConfigChanged` has come or patience ends."""
    assert pool.recovering_until is not None, "only a ledger that recovers waits for its configuration"
    pool.early = []
    pool.recovers_at = pool.recovering_until
    pool.recovering_until += patience_s


def keep(pool: Pool, event: Event) -> bool:
    """Whether an event has to wait for the configuration; it is kept then."""
    early = pool.early
    assert early is not None, "asked only while events are kept"
    if isinstance(event, NodesChanged | Ticked):
        return False
    if isinstance(event, RequestArrived):
        if len(early) >= MAX_EVENTS:
            _refuse(pool, event, "BackendUnavailable", "the scheduler is being restarted", retry_after=1)
            return True
        if event.deadline < pool.early_deadline:
            pool.early_deadline = event.deadline
    early.append(event)
    return True


def refuse_late(pool: Pool, now: float) -> None:
    """No wait without an end: requests whose deadline has come are refused, though nothing is known of their model."""
    if now < pool.early_deadline:
        return
    early = pool.early or []
    cancelled = {event.request for event in early if isinstance(event, RequestCancelled)}
    late = {event.request: event for event in early if isinstance(event, RequestArrived) and event.deadline <= now}
    for event in late.values():
        if event.request not in cancelled:
            message = "the deadline passed while the scheduler was being restarted"
            _refuse(pool, event, "BackendTimeout", message, phase="queued")
    pool.early = [event for event in early if not (isinstance(event, RequestArrived) and event.request in late)]
    waiting = (event.deadline for event in pool.early if isinstance(event, RequestArrived))
    pool.early_deadline = min(waiting, default=INFINITY)


def take(pool: Pool, now: float, configured: bool) -> list[Event]:
    """End the keeping: the events that were kept, in order. The window closes as soon as it may."""
    early, pool.early = pool.early or [], None
    pool.early_deadline = INFINITY
    pool.recovering_until = max(pool.recovers_at, now + GRACE_S) if configured else now
    pool.wake = min(pool.wake, pool.recovering_until)
    return early


def _refuse(pool: Pool, event: RequestArrived, error: str, message: str, **extras: object) -> None:
    pool.submitted += 1
    pool.reject(event.request, event.holder, error, message, **extras)
