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


class Line(deque[W]):
    """The waiters of one class, with what is looked at together with them.

    `rank` is that of its head, `latest` the latest deadline so far, `waiting` how many of them still wait.
    """

    __slots__ = ("latest", "rank", "waiting")

    def __init__(self) -> None:
        self.rank = INFINITY
        self.waiting = 0
        self.latest = -INFINITY


class WaitQueue(Generic[W]):
    """The waiters of one model, by class; first come, first served within a class.

    Ageing needs no clock: a waiter of class p counts as having arrived `(p - 1) * ageing_s` later than it did, so the
    order of two waiters never changes once both stand in line, and the ranks of three heads are all that must be
    compared. The lines keep them, so that to find the best touches one waiter and not three. When the head of a class
    has left, the next one is looked at when the best is asked for, and not before: in a pool with very many waiters
    whatever is touched comes from far away.

    Nor do deadlines need an entry per request. Those who came with equal patience give up in the order in which they
    came, so the head of a class is the first of them; `hasty` has the others, who will give up before one who came
    earlier.
    """

    __slots__ = ("count", "hasty", "lines", "open", "serial", "since_sum")

    def __init__(self) -> None:
        self.lines: tuple[Line[W], Line[W], Line[W]] = (Line(), Line(), Line())
        self.count = 0
        self.since_sum = 0.0
        # the line whose head has left, and whose next one was not looked at yet
        self.open: Line[W] | None = None
        # those who give up earlier than somebody who came before them in their class
        self.hasty: list[tuple[float, int, W]] = []
        self.serial = 0

    @property
    def counts(self) -> list[int]:
        """How many wait of each class."""
        return [line.waiting for line in self.lines]

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[W]:
        return (waiter for line in self.lines for waiter in line if waiter.waits)

    def join(self, waiter: W, now: float, ageing_s: float) -> None:
        """Put at the end of its class. Mutates the waiter."""
        index = waiter.priority - 1
        waiter.rank = rank = now + ageing_s * index if index else now
        line = self.lines[index]
        if not line.waiting:
            # All that may still stand there has left.
            line.clear()
            line.rank = rank
            line.latest = -INFINITY
            if self.open is line:
                self.open = None
        line.append(waiter)
        deadline = waiter.deadline
        if deadline >= line.latest:
            line.latest = deadline
        else:
            self.serial += 1
            heapq.heappush(self.hasty, (deadline, self.serial, waiter))
        line.waiting += 1
        self.count += 1
        self.since_sum += now

    def leave(self, waiter: W) -> None:
        """Take out one that is marked as waiting no longer."""
        line = self.lines[waiter.priority - 1]
        line.waiting = left = line.waiting - 1
        if line[0] is waiter:
            line.popleft()
            if self.open is not None and self.open is not line:
                self._look_at_next(self.open)
            self.open = line
        elif len(line) > 64 + 2 * left:
            kept = [each for each in line if each.waits]
            line.clear()
            line.extend(kept)
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
        high, medium, low = self.lines
        first = high if high.rank <= medium.rank else medium
        return first[0] if first.rank <= low.rank else low[0]

    def heads(self) -> Iterator[W]:
        """The longest waiting of each class that has any."""
        if self.open is not None:
            self._look_at_next(self.open)
        return (line[0] for line in self.lines if line)

    def _look_at_next(self, line: Line[W]) -> None:
        """Find the head of a class again. Drops the marked that stand before it."""
        while line and not line[0].waits:
            line.popleft()
        line.rank = line[0].rank if line else INFINITY
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
