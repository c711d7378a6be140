"""Those who wait: one queue per model with three classes and ageing, and their deadlines.

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
    compared. They are kept beside the lines, so that to find the best touches one waiter and not three. When the head
    of a class has left, the next one is looked at when the best is asked for, and not before: in a pool with very many
    waiters whatever is touched comes from far away.

    Nor do deadlines need an entry per request. Those who came with equal patience give up in the order in which they
    came, so the head of a class is the first of them; `hasty` has the others, who will give up before one who came
    earlier.
    """

    __slots__ = ("count", "counts", "hasty", "latest", "lines", "open", "ranks", "serial", "since_sum")

    def __init__(self) -> None:
        self.lines: list[deque[W]] = [deque(), deque(), deque()]
        self.ranks = [INFINITY, INFINITY, INFINITY]
        self.counts = [0, 0, 0]
        self.count = 0
        self.since_sum = 0.0
        # the class whose head has left, and whose next one was not looked at yet
        self.open: int | None = None
        # the latest deadline of each class so far, and a heap of those who came later and give up earlier
        self.latest = [-INFINITY, -INFINITY, -INFINITY]
        self.hasty: list[tuple[float, int, W]] = []
        self.serial = 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[W]:
        return (waiter for line in self.lines for waiter in line if waiter.waits)

    def join(self, waiter: W, now: float, ageing_s: float) -> None:
        """Put at the end of its class. Mutates the waiter."""
        index = waiter.priority - 1
        waiter.rank = rank = now + ageing_s * index if index else now
        line = self.lines[index]
        if not self.counts[index]:
            # All that may still stand there has left.
            line.clear()
            self.ranks[index] = rank
            self.latest[index] = -INFINITY
            if self.open == index:
                self.open = None
        line.append(waiter)
        deadline = waiter.deadline
        if deadline >= self.latest[index]:
            self.latest[index] = deadline
        else:
            self.serial += 1
            heapq.heappush(self.hasty, (deadline, self.serial, waiter))
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
            if self.open is not None and self.open != index:
                self._look_at_next(self.open)
            self.open = index
        elif len(line) > 64 + 2 * left:
            self.lines[index] = deque(each for each in line if each.waits)
        if len(self.hasty) > 64 + 2 * self.count:
            self.hasty = [entry for entry in self.hasty if entry[2].waits]
            heapq.heapify(self.hasty)
        self.count -= 1
        # An empty queue starts from zero again, so that rounding errors never add up.
        self.since_sum = self.since_sum - waiter.since if self.count else 0.0

    def head(self) -> W | None:
        """Who goes next."""
        if not self.count:
            return None
        if self.open is not None:
            self._look_at_next(self.open)
        high, medium, low = self.ranks
        if high <= medium:
            return self.lines[0][0] if high <= low else self.lines[2][0]
        return self.lines[1][0] if medium <= low else self.lines[2][0]

    def heads(self) -> Iterator[W]:
        """The longest waiting of each class that has any."""
        if self.open is not None:
            self._look_at_next(self.open)
        return (line[0] for line in self.lines if line)

    def _look_at_next(self, index: int) -> None:
        """Find the head of a class again. Drops the marked that stand before it."""
        line = self.lines[index]
        while line and not line[0].waits:
            line.popleft()
        self.ranks[index] = line[0].rank if line else INFINITY
        self.open = None

    def soonest(self) -> W | None:
        """Who gives up first; None if nobody waits. Drops the marked that stand in front."""
        while self.hasty and not self.hasty[0][2].waits:
            heapq.heappop(self.hasty)
        first = self.hasty[0][2] if self.hasty else None
        for head in self.heads():
            if first is None or head.deadline < first.deadline:
                first = head
        return first

    def first_deadline(self) -> float:
        """When the first of them gives up; infinite if nobody waits."""
        first = self.soonest()
        return INFINITY if first is None else first.deadline

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
