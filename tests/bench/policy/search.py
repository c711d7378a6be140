"""An offline schedule that can be carried out, near the best there is: a beam search that knows the whole trace.

On one device a schedule is a chain of *turns*: a model is loaded, so many of its requests are granted, and it drains
for the next model. A drain that is to begin at all may as well begin right after a grant, since whoever knows all
arrivals has nothing to wait for. So a search node is a moment right after a grant, and its children are: go on, or
drain now for one of the other models. Each model's line keeps the order that the pool promises (class with ageing,
then first come, first served): the search chooses turns, not favourites.

All nodes advance together in windows of time. At the end of a window those of equal past are merged, and the best go
on: those that lost least so far, together with what those who wait now will lose if the devices serve one crowd after
the other. The objective is the sum of all waits; a second beyond the bound of a request's class counts `LATE` times.

What is left out: who is impatient is taken to keep his place in line while he asks again, and the search knows one
device per replica and one replica per model, as in the traces.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field
from heapq import heapify, heapreplace
from itertools import combinations
from typing import NamedTuple

from tests.bench.policy.lines import INFINITY, Lines, Talks, cost_of
from tests.bench.policy.traces import START_S, STOP_S, Trace

# What a drain takes beyond the last grant, about, when the next turns are only estimated.
TAIL_S = 1.5

# States are kept apart by what stands on the devices, and whether it serves within so many seconds: a swap must be
# paid for before it is worth anything, so its states would lose against all others before they can show it.
SOON_S = 5.0


class Turn(NamedTuple):
    """A model's stay on a device: so many grants, and it drains. The last turn of a device has no end."""

    model: str
    grants: float


class Device(NamedTuple):
    """What one device does: its model, when each of its slots is free, and its next grant, if it goes on.

    `before` is the model that made room, and when that is gone.
    """

    model: int
    slots: tuple[float, ...]
    grants: int
    next_at: float
    next_lane: int
    before: int = -1
    gone_at: float = 0.0


class Path(NamedTuple):
    """The turns that ended, the last first."""

    earlier: Path | None
    device: int
    turn: Turn


@dataclass(slots=True, eq=False)
class State:
    """A moment of a schedule: all grants up to here are made, and so much was lost by them."""

    devices: tuple[Device, ...]
    heads: tuple[int, ...]
    talks: Talks
    cost: float
    path: Path | None
    value: float = field(default=0.0)


class Search:
    """One search. `width` states go on after each window of `window_s`; a drain tries `breadth` successors."""

    def __init__(self, trace: Trace, width: int = 200, window_s: float = 2.0, breadth: int = 3) -> None:
        self.trace, self.width, self.window_s, self.breadth = trace, width, window_s, breadth
        self.lines = Lines(trace)
        self.change_s = [STOP_S + START_S + trace.load_s[name] for name in self.lines.names]

    def run(self) -> list[list[Turn]]:
        """The turns of each device, in order."""
        beam = self._roots()
        end = self.trace.begin_s
        done: State | None = None
        while beam:
            end += self.window_s
            grown: list[State] = []
            while beam:
                state = beam.pop()
                index = min(range(len(state.devices)), key=lambda each: state.devices[each].next_at)
                when = state.devices[index].next_at
                if when <= end:
                    beam += self._children(state, index)
                elif when < INFINITY:
                    grown.append(state)
                # Otherwise whoever is left has no device, and gets none any more: a sibling has drained in time.
                elif self.lines.is_served(state.heads, state.talks) and (done is None or state.cost < done.cost):
                    done = state
            beam = self._best(grown, end)
        assert done is not None
        return self._chains(done)

    def _chains(self, state: State) -> list[list[Turn]]:
        chains: list[list[Turn]] = [[Turn(self.lines.names[each.model], INFINITY)] for each in state.devices]
        path = state.path
        while path is not None:
            chains[path.device].append(path.turn)
            path = path.earlier
        return [chain[::-1] for chain in chains]

    # --- steps --------------------------------------------------------------------------------------------------

    def _device(
        self, model: int, ready_at: float, heads: tuple[int, ...], talks: Talks, before: int = -1, gone_at: float = 0.0
    ) -> Device:
        """A device whose model will be ready at a time."""
        when, lane = self.lines.upcoming(model, ready_at, heads, talks)
        return Device(model, (ready_at,) * self.trace.slots, 0, when, lane, before, gone_at)

    def _roots(self) -> list[State]:
        """Any of the models that are asked for first may be loaded first."""
        begin_s, talks = self.trace.begin_s, self.lines.first_talks
        heads = (0,) * len(self.lines.lanes)
        models = range(len(self.lines.names))
        ready = [self._device(each, begin_s + self.change_s[each] - STOP_S, heads, talks) for each in models]
        ready.sort(key=lambda each: each.next_at)
        first = combinations(ready[: self.trace.gpus + 2], min(self.trace.gpus, len(ready)))
        return [State(devices, heads, talks, 0.0, None) for devices in first]

    def _children(self, state: State, index: int) -> list[State]:
        """After the next grant of one device: it goes on, or drains for one of those who wait."""
        device = state.devices[index]
        now, lane = device.next_at, device.next_lane
        heads, talks, service_s, lost = self._grant(state, lane, now)
        slots = list(device.slots[1:])
        insort(slots, now + service_s)
        when, following = self.lines.upcoming(device.model, slots[0], heads, talks)
        devices = list(state.devices)
        devices[index] = device._replace(
            slots=tuple(slots), grants=device.grants + 1, next_at=when, next_lane=following
        )
        if lane < 0:
            # A conversation goes on, perhaps with the model of another device.
            for other, each in enumerate(devices):
                next_at, next_lane = self.lines.upcoming(each.model, each.slots[0], heads, talks)
                devices[other] = each._replace(next_at=next_at, next_lane=next_lane)
        cost = state.cost + lost
        found = [State(tuple(devices), heads, talks, cost, state.path)]
        if when <= now:
            # Another one can go at the same instant: nobody is shut out whom the door could still let in.
            return found
        path = Path(state.path, index, Turn(self.lines.names[device.model], device.grants + 1))
        gone_at = slots[-1] + STOP_S
        for model in self._successors(devices, index, heads, talks, gone_at):
            ready_at = gone_at - STOP_S + self.change_s[model]
            after = self._device(model, ready_at, heads, talks, device.model, gone_at)
            found.append(State((*devices[:index], after, *devices[index + 1 :]), heads, talks, cost, path))
        return found

    def _grant(self, state: State, lane: int, now: float) -> tuple[tuple[int, ...], Talks, float, float]:
        """The lines after the grant of a lane's or a conversation's next, its service time, and what it has lost."""
        heads, talks = state.heads, state.talks
        if lane >= 0:
            line, head = self.lines.lanes[lane], heads[lane]
            heads = (*heads[:lane], head + 1, *heads[lane + 1 :])
            return heads, talks, line.services[head], cost_of(now - line.arrivals[head], line.bound_s)
        which = -1 - lane
        number, arrival = talks[which]
        question = self.lines.sessions[which][number]
        again = now + question.service_s + self.lines.pauses[which]
        is_last = number + 1 == len(self.lines.sessions[which])
        talks = (*talks[:which], (number, INFINITY) if is_last else (number + 1, again), *talks[which + 1 :])
        return heads, talks, question.service_s, cost_of(now - arrival, question.bound_s)

    def _successors(
        self, devices: list[Device], index: int, heads: tuple[int, ...], talks: Talks, gone_at: float
    ) -> list[int]:
        """For whom a device may drain: who will have lost most when loaded, or comes before the device's own next."""
        taken = {each.model for each in devices}
        taken |= {each.before for each in devices if each.gone_at > gone_at}
        ranked = []
        for model in range(len(self.lines.names)):
            if model in taken:
                continue
            ready_at = gone_at - STOP_S + self.change_s[model]
            first, _ = self.lines.upcoming(model, ready_at, heads, talks)
            if first <= ready_at or first < devices[index].next_at:
                lost = sum(self.lines.lanes[lane].lost(heads[lane], ready_at) for lane in self.lines.lanes_of[model])
                ranked.append((-lost, first, model))
        ranked.sort()
        return [model for _, _, model in ranked[: self.breadth]]

    # --- judging ------------------------------------------------------------------------------------------------

    def _best(self, grown: list[State], now: float) -> list[State]:
        """Who goes on: of states that differ in nothing but their cost the cheapest, and the best of each kind."""
        merged: dict[object, State] = {}
        for state in grown:
            key = (state.heads, state.talks, tuple(each[:2] for each in state.devices))
            if key not in merged or state.cost < merged[key].cost:
                merged[key] = state
        kinds: dict[object, list[State]] = {}
        for state in merged.values():
            state.value = self._value(state, now)
            kind = tuple((each.model, each.slots[0] > now + SOON_S) for each in state.devices)
            kinds.setdefault(kind, []).append(state)
        kept: list[State] = []
        share = max(3, self.width // max(1, min(len(kinds), 6)))
        for states in kinds.values():
            states.sort(key=lambda each: each.value)
            kept += states[:share]
        kept.sort(key=lambda each: each.value)
        return kept[: self.width]

    def _value(self, state: State, now: float) -> float:
        """What is lost so far, and what those who wait will lose if nobody else comes: the shortest crowds first."""
        lost, counts = self.lines.waiting(state.heads, state.talks, now)
        value = state.cost + lost
        free = []
        for device in state.devices:
            count, counts[device.model] = counts[device.model], 0
            work = self.lines.service_s[device.model] / self.trace.slots * count
            value += count * (max(0.0, device.slots[0] - now) + work / 2.0)
            free.append(max(0.0, device.slots[-1] - now) + work)
        heapify(free)
        crowds = []
        for model, count in enumerate(counts):
            if count:
                work = self.lines.service_s[model] / self.trace.slots * count
                crowds.append(((self.change_s[model] + work) / count, count, self.change_s[model], work))
        for _, count, change_s, work in sorted(crowds):
            begin = free[0] + change_s
            value += count * (begin + work / 2.0)
            heapreplace(free, begin + work + TAIL_S)
        return value
