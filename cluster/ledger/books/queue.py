"""Those who wait: one queue per model with three classes and ageing, and the pool's deadlines.

Lines are plain `deque`s, the cheapest and most compact there is. Who leaves from the middle is only marked
(`waits`) and skipped later; a line that is mostly marks is rebuilt, so its length stays within twice the number
of those who wait, and every operation takes constant time on average.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

INFINITY = float("inf")


class Waiting(Protocol):
    """What a line knows of those who stand in it. `rank` orders all waiters of the pool: lower goes first."""

    priority: int
    deadline: float
    rank: float
    since: float
    waits: bool


W = TypeVar("W", bound=Waiting)


class WaitQueue(Generic[W]):
    """The waiters of one model, by class; first come, first served within a class.

    Ageing needs no clock: a waiter of class p counts as having arrived `(p - 1) * ageing_s` later than it did, so the
    order of two waiters never changes once both stand in line, and the ranks of three heads are all that must be
    compared. They are kept beside the lines, so that to find the best touches one waiter and not three.
    """

    __slots__ = ("count", "counts", "lines", "ranks", "since_sum", "soonest")

    def __init__(self) -> None:
        self.lines: list[deque[W]] = [deque(), deque(), deque()]
        self.ranks = [INFINITY, INFINITY, INFINITY]
        self.counts = [0, 0, 0]
        self.count = 0
        self.since_sum = 0.0
        # whose deadline comes first; no other's comes before it, also when it waits no longer
        self.soonest: W | None = None

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[W]:
        return (waiter for line in self.lines for waiter in line if waiter.waits)

    def join(self, waiter: W, now: float, ageing_s: float) -> None:
        """Put at the end of its class. Mutates the waiter."""
        index = waiter.priority - 1
        waiter.rank = rank = now + ageing_s * index
        self.lines[index].append(waiter)
        if not self.counts[index]:
            self.ranks[index] = rank
        if self.soonest is None or not self.count or waiter.deadline < self.soonest.deadline:
            self.soonest = waiter
        self.counts[index] += 1
        self.count += 1
        self.since_sum += now

    def leave(self, waiter: W) -> None:
        """Take out one that is marked as waiting no longer."""
        index = waiter.priority - 1
        line = self.lines[index]
        self.counts[index] = left = self.counts[index] - 1
        if line[0] is waiter:
            line.popleft()
            while line and not line[0].waits:
                line.popleft()
            self.ranks[index] = line[0].rank if line else INFINITY
        elif len(line) > 64 + 2 * left:
            self.lines[index] = deque(each for each in line if each.waits)
        self.count -= 1
        # An empty queue starts from zero again, so that rounding errors never add up.
        self.since_sum = self.since_sum - waiter.since if self.count else 0.0

    def head(self) -> W | None:
        """Who goes next."""
        if not self.count:
            return None
        high, medium, low = self.ranks
        if high <= medium:
            return self.lines[0][0] if high <= low else self.lines[2][0]
        return self.lines[1][0] if medium <= low else self.lines[2][0]

    def heads(self) -> Iterator[W]:
        """The longest waiting of each class that has any."""
        return (line[0] for line in self.lines if line)

    def first_deadline(self) -> float:
        """When the first of them gives up; infinite if nobody waits. Looks at all only if that one has left."""
        if self.soonest is not None and not self.soonest.waits:
            self.soonest = min(self, key=lambda waiter: waiter.deadline, default=None)
        return INFINITY if self.soonest is None else self.soonest.deadline

    def waited(self, now: float) -> float:
        """All the time spent waiting here so far, in request-seconds."""
        return max(0.0, self.count * now - self.since_sum)

    def position(self, waiter: W, limit: int = 1000) -> int:
        """1-based place in line, exact up to `limit` and never more than that: it is a comment for a human."""
        place = 1
        for line in self.lines:
            for other in line:
                if not other.waits:
                    continue
                if other is waiter or other.rank > waiter.rank or place >= limit:
                    break
                place += 1
        return place


class Deadlines(Generic[W]):
    """When which waiter gives up, without a heap entry per request.

    Requests with equal timeouts reach their deadlines in the order in which they came. So a lane is a line whose
    deadlines never fall; a waiter joins the first lane that stays sorted. A handful of lanes holds a handful of
    different timeouts; what fits into none goes to a small heap, cleaned whenever most of it is dead.
    """

    __slots__ = ("count", "heap", "lanes", "serial", "stale")
    LANES = 8

    def __init__(self) -> None:
        self.lanes: list[deque[W]] = [deque() for _ in range(self.LANES)]
        self.heap: list[tuple[float, int, W]] = []
        self.count = 0
        self.stale = 0
        self.serial = 0

    def add(self, waiter: W) -> None:
        self.count += 1
        for lane in self.lanes:
            if not lane or lane[-1].deadline <= waiter.deadline:
                lane.append(waiter)
                return
        self.serial += 1
        heapq.heappush(self.heap, (waiter.deadline, self.serial, waiter))

    def left(self) -> None:
        """One of them does not wait any longer, and is marked."""
        self.count -= 1
        self.stale += 1
        if self.stale > 64 + 2 * self.count:
            self.lanes = [deque(each for each in lane if each.waits) for lane in self.lanes]
            self.heap = [entry for entry in self.heap if entry[2].waits]
            heapq.heapify(self.heap)
            self.stale = 0

    def first(self) -> W | None:
        """Whose deadline comes next. Drops the marked that stand in front."""
        best: W | None = None
        for lane in self.lanes:
            while lane and not lane[0].waits:
                lane.popleft()
            if lane and (best is None or lane[0].deadline < best.deadline):
                best = lane[0]
        while self.heap and not self.heap[0][2].waits:
            heapq.heappop(self.heap)
        if self.heap and (best is None or self.heap[0][0] < best.deadline):
            best = self.heap[0][2]
        return best

    def __len__(self) -> int:
        return self.count
