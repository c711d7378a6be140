"""Those who wait: one queue per model with three classes and ageing, and the pool's deadlines.

Nothing here is deleted lazily but the overflow heap of `Deadlines`: an `OrderedDict` gives first-in-first-out order
and removal from the middle, both in constant time.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cluster.ledger.records import Model

INFINITY = float("inf")


class Waiter:
    """One request that waits for a slot. `rank` orders all waiters of the pool: lower goes first."""

    __slots__ = (
        "arrived",
        "deadline",
        "fallbacks",
        "holder",
        "keep_alive_s",
        "lane",
        "model",
        "priority",
        "rank",
        "request",
        "since",
    )

    def __init__(
        self,
        request: str,
        holder: str,
        model: Model,
        priority: int,
        deadline: float,
        keep_alive_s: float | None,
        now: float,
    ) -> None:
        self.request = request
        self.holder = holder
        self.model = model
        self.priority = priority
        self.deadline = deadline
        self.keep_alive_s = keep_alive_s
        self.arrived = now
        self.since = now
        self.rank = now
        self.fallbacks: tuple[str, ...] = ()
        self.lane: OrderedDict[str, Waiter] | None = None


class WaitQueue:
    """The waiters of one model, by class; first come, first served within a class.

    Ageing needs no clock: a waiter of class p counts as having arrived `(p - 1) * ageing_s` later than it did, so the
    order of two waiters never changes once both stand in line, and three heads are all that must be compared.
    """

    __slots__ = ("classes", "count", "since_sum")

    def __init__(self) -> None:
        self.classes: tuple[OrderedDict[str, Waiter], ...] = (OrderedDict(), OrderedDict(), OrderedDict())
        self.count = 0
        self.since_sum = 0.0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Waiter]:
        for line in self.classes:
            yield from line.values()

    def join(self, waiter: Waiter, now: float, ageing_s: float) -> None:
        """Put at the end of its class. Mutates the waiter."""
        waiter.since = now
        waiter.rank = now + ageing_s * (waiter.priority - 1)
        self.classes[waiter.priority - 1][waiter.request] = waiter
        self.count += 1
        self.since_sum += now

    def leave(self, waiter: Waiter) -> None:
        del self.classes[waiter.priority - 1][waiter.request]
        self.count -= 1
        # An empty queue starts from zero again, so that rounding errors never add up.
        self.since_sum = self.since_sum - waiter.since if self.count else 0.0

    def head(self) -> Waiter | None:
        """Who goes next."""
        best: Waiter | None = None
        for line in self.classes:
            if line:
                first: Waiter = line[next(iter(line))]
                if best is None or first.rank < best.rank:
                    best = first
        return best

    def heads(self) -> Iterator[Waiter]:
        """The longest waiting of each class that has any."""
        for line in self.classes:
            if line:
                yield line[next(iter(line))]

    def waited(self, now: float) -> float:
        """All the time spent waiting here so far, in request-seconds."""
        return max(0.0, self.count * now - self.since_sum)

    def position(self, waiter: Waiter, limit: int = 1000) -> int:
        """1-based place in line, exact up to `limit` and never more than that: it is a comment for a human."""
        place = 1
        for line in self.classes:
            for other in line.values():
                if other is waiter or other.rank > waiter.rank or place >= limit:
                    break
                place += 1
        return place


class Deadlines:
    """When which waiter gives up, without a heap entry per request.

    Requests with equal timeouts reach their deadlines in the order in which they came. So a *lane* is a queue whose
    deadlines never fall; a waiter joins the first lane that stays sorted. A handful of lanes holds a handful of
    different timeouts; what fits into none goes to a small heap, cleaned whenever most of it is dead.
    """

    __slots__ = ("dead", "heap", "lanes", "overflow")
    LANES = 8

    def __init__(self) -> None:
        self.lanes: list[OrderedDict[str, Waiter]] = [OrderedDict() for _ in range(self.LANES)]
        self.overflow: OrderedDict[str, Waiter] = OrderedDict()
        self.heap: list[tuple[float, str]] = []
        self.dead = 0

    def add(self, waiter: Waiter) -> None:
        for lane in self.lanes:
            if not lane or lane[next(reversed(lane))].deadline <= waiter.deadline:
                lane[waiter.request] = waiter
                waiter.lane = lane
                return
        self.overflow[waiter.request] = waiter
        waiter.lane = self.overflow
        heapq.heappush(self.heap, (waiter.deadline, waiter.request))

    def remove(self, waiter: Waiter) -> None:
        lane = waiter.lane
        assert lane is not None, f"{waiter.request} waits without a deadline"
        del lane[waiter.request]
        waiter.lane = None
        if lane is self.overflow:
            self.dead += 1
            if self.dead > 64 + len(self.overflow):
                self.heap = [(each.deadline, each.request) for each in self.overflow.values()]
                heapq.heapify(self.heap)
                self.dead = 0

    def first(self) -> Waiter | None:
        """Whose deadline comes next. Drops dead heap entries."""
        best: Waiter | None = None
        for lane in self.lanes:
            if lane:
                waiter: Waiter = lane[next(iter(lane))]
                if best is None or waiter.deadline < best.deadline:
                    best = waiter
        while self.heap:
            deadline, request = self.heap[0]
            found = self.overflow.get(request)
            # The same id may have come back with another deadline: only the exact pair is alive.
            if found is not None and found.deadline == deadline:
                return found if best is None or deadline < best.deadline else best
            heapq.heappop(self.heap)
            self.dead = max(0, self.dead - 1)
        return best

    def __len__(self) -> int:
        return sum(len(lane) for lane in self.lanes) + len(self.overflow)
