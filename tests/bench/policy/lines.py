"""A trace as the search reads it: each model's requests in order of arrival, conversations, and what waiting costs."""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate
from typing import NamedTuple

from tests.bench.policy.traces import Trace

INFINITY = float("inf")

# What a second beyond the bound costs, in seconds of waiting: so much that a bound is kept wherever it can be.
LATE = 40.0

# Of each conversation, its next question and when that comes: infinite if it has none, or waits for an answer.
Talks = tuple[tuple[int, float], ...]


def cost_of(wait_s: float, bound_s: float) -> float:
    return wait_s + (LATE * (wait_s - bound_s) if wait_s > bound_s else 0.0)


class Lane:
    """One model's requests of one class, in order of arrival."""

    def __init__(self, asked: list[tuple[float, float]], model: int, delay_s: float, bound_s: float) -> None:
        self.arrivals = [when for when, _ in asked]
        self.services = [service_s for _, service_s in asked]
        self.sums = [0.0, *accumulate(self.arrivals)]
        self.model, self.delay_s, self.bound_s = model, delay_s, bound_s
        self.size = len(asked)

    def lost(self, head: int, now: float) -> float:
        """What those from `head` on who have come have lost so far: their waits, and more beyond the bound."""
        arrivals, sums = self.arrivals, self.sums
        if head >= self.size or arrivals[head] > now:
            return 0.0
        end = bisect_right(arrivals, now, head)
        total = (end - head) * now - (sums[end] - sums[head])
        limit = now - self.bound_s
        if arrivals[head] < limit:
            late = bisect_right(arrivals, limit, head)
            total += LATE * ((late - head) * limit - (sums[late] - sums[head]))
        return total


class Question(NamedTuple):
    """One of a conversation's."""

    model: int
    service_s: float
    delay_s: float
    bound_s: float


class Lines:
    """All that is asked for in a trace; models have numbers."""

    def __init__(self, trace: Trace) -> None:
        self.names = list(trace.load_s)
        number = {name: index for index, name in enumerate(self.names)}
        ageing_s = trace.spec().ageing_s
        asked: dict[tuple[int, int], list[tuple[float, float]]] = {}
        for when, model, priority, service_s in sorted(trace.arrivals):
            asked.setdefault((number[model], priority), []).append((when, service_s))
        self.lanes: list[Lane] = []
        self.lanes_of: list[list[int]] = [[] for _ in self.names]
        for (index, priority), each in sorted(asked.items()):
            self.lanes_of[index].append(len(self.lanes))
            bound_s = trace.bound_s(self.names[index], priority)
            self.lanes.append(Lane(each, index, (priority - 1) * ageing_s, bound_s))
        self.sessions = [
            [
                Question(number[model], service_s, (priority - 1) * ageing_s, trace.bound_s(model, priority))
                for model, priority, service_s in session.questions
            ]
            for session in trace.sessions
        ]
        self.pauses = [session.pause_s for session in trace.sessions]
        self.first_talks: Talks = tuple((0, session.start_s) for session in trace.sessions)
        services: list[list[float]] = [[] for _ in self.names]
        for model, _, service_s in trace.asked:
            services[number[model]].append(service_s)
        self.service_s = [sum(each) / max(1, len(each)) for each in services]

    def upcoming(self, model: int, free_at: float, heads: tuple[int, ...], talks: Talks) -> tuple[float, int]:
        """When a model's next grant is, and whose: a lane, or a conversation counted from -1 down."""
        found = []
        first = INFINITY
        for index in self.lanes_of[model]:
            lane = self.lanes[index]
            if heads[index] < lane.size:
                arrival = lane.arrivals[heads[index]]
                found.append((arrival + lane.delay_s, arrival, index))
                first = min(first, arrival)
        for index, (question, arrival) in enumerate(talks):
            if arrival < INFINITY and self.sessions[index][question].model == model:
                found.append((arrival + self.sessions[index][question].delay_s, arrival, -1 - index))
                first = min(first, arrival)
        when = max(free_at, first)
        if len(found) == 1:
            return when, found[0][2]
        return when, min((each for each in found if each[1] <= when), default=(0.0, 0.0, 0))[2]

    def waiting(self, heads: tuple[int, ...], talks: Talks, now: float) -> tuple[float, list[int]]:
        """What those who wait now have lost so far, and how many they are, by model."""
        lost, counts = 0.0, [0] * len(self.names)
        for lane, head in zip(self.lanes, heads, strict=True):
            if head < lane.size and lane.arrivals[head] <= now:
                lost += lane.lost(head, now)
                counts[lane.model] += bisect_right(lane.arrivals, now, head) - head
        for session, (question, arrival) in zip(self.sessions, talks, strict=True):
            if arrival < now:
                lost += cost_of(now - arrival, session[question].bound_s)
                counts[session[question].model] += 1
        return lost, counts

    def is_served(self, heads: tuple[int, ...], talks: Talks) -> bool:
        """Nobody is left."""
        return all(head == lane.size for head, lane in zip(heads, self.lanes, strict=True)) and all(
            arrival == INFINITY for _, arrival in talks
        )
