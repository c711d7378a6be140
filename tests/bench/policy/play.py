"""Plays a trace through the simulated cluster with one scheduler in it, and measures how long everybody waited."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.bench.policy.traces import START_S, Session, Trace
from tests.bench.policy.validate import Recorder
from tests.sim.world import Request, Scheduler, World


class Visit:
    """One question on its way to an answer, asked again and again by who is impatient."""

    def __init__(
        self, world: World, trace: Trace, question: tuple[str, int, float], then: Callable[[], None] | None = None
    ) -> None:
        self.world, self.question, self.then = world, question, then
        self.patience_s = trace.patience_s.get(question[0])
        self.began = world.now
        self.wait_s: float | None = None
        self.ask()

    def ask(self) -> None:
        model, priority, service_s = self.question
        timeout_s = self.patience_s or 1e6
        request = self.world.submit(model, service_s, priority=priority, timeout_s=timeout_s)
        request.then = lambda: self.over(request)
        if self.patience_s:
            self.world.at(self.world.now + timeout_s, lambda: self.give_up(request))

    def give_up(self, request: Request) -> None:
        if request.granted is None:
            self.world.cancel(request)

    def over(self, request: Request) -> None:
        if request.granted is None:
            # Who is refused at once comes back when half of his patience is over, not in the same instant.
            asked_s = self.world.now - request.arrived
            self.world.at(self.world.now + max(0.0, 0.5 * (self.patience_s or 0.0) - asked_s), self.ask)
            return
        self.wait_s = request.granted - self.began
        if self.then is not None:
            self.then()


@dataclass
class Played:
    """What became of a trace: each question (model, priority, service time) with its whole wait, in the order asked."""

    trace: Trace
    world: World
    waits: list[tuple[tuple[str, int, float], float]]

    def figures(self) -> dict[str, float]:
        begin_s = self.trace.begin_s
        served = [each for each in self.world.requests.values() if each.granted is not None]
        end = max((each.granted or 0.0) + each.service_s for each in served)
        late = sum(wait_s > self.trace.bound_s(*question[:2]) for question, wait_s in self.waits)
        return figures([wait_s for _, wait_s in self.waits], self.world.swaps, end - begin_s, late)


def play(trace: Trace, make: Callable[[float], Scheduler], kind: type[World] = Recorder) -> Played:
    """One scheduler's way through a trace. Raises if somebody was cut off, or never served."""
    world = kind(trace.spec(), make, load_s=trace.load_s)
    visits: list[Visit] = []

    def ask(question: tuple[str, int, float], then: Callable[[], None] | None = None) -> None:
        visits.append(Visit(world, trace, question, then))

    def go_on(session: Session, number: int) -> None:
        if number < len(session.questions):
            world.at(world.now + session.pause_s * bool(number), lambda: talk(session, number))

    def talk(session: Session, number: int) -> None:
        ask(session.questions[number], lambda: go_on(session, number + 1))

    for when, *question in trace.arrivals:
        world.at(when, lambda q=tuple(question): ask(q))
    for session in trace.sessions:
        world.at(session.start_s, lambda s=session: talk(s, 0))
    world.run()
    unserved = [each.question for each in visits if each.wait_s is None]
    assert not unserved, f"{len(unserved)} questions were never answered"
    assert len(visits) == len(trace.asked), "a conversation broke off"
    assert not world.cut, world.cut
    assert not world.crimes, world.crimes
    return Played(trace, world, [(each.question, each.wait_s or 0.0) for each in visits])


def lower_bound(trace: Trace) -> dict[str, float]:
    """A bound below every scheduler, which no schedule reaches: each model has the whole cluster for itself.

    It has as many slots as it likes, and is loaded once, from the first arrival of the trace on, since its turn is
    foreseen. Start and stop of processes count as in the world.
    """
    begin_s = trace.begin_s
    waits, ends = [], []

    def ask(when: float, model: str, service_s: float) -> float:
        ready = max(when, begin_s + START_S + trace.load_s[model])
        waits.append(ready - when)
        ends.append(ready + service_s)
        return ends[-1]

    for when, model, _, service_s in trace.arrivals:
        ask(when, model, service_s)
    for session in trace.sessions:
        when = session.start_s
        for model, _, service_s in session.questions:
            when = ask(when, model, service_s) + session.pause_s
    return figures(waits, len({model for model, *_ in trace.asked}), max(ends) - begin_s, 0)


def figures(waits: list[float], swaps: int, makespan_s: float, late: int) -> dict[str, float]:
    ordered = sorted(waits)
    return {
        "mean_wait_s": round(sum(waits) / len(waits), 3),
        "p95_wait_s": round(ordered[int(0.95 * (len(ordered) - 1))], 3),
        "max_wait_s": round(ordered[-1], 3),
        "swaps": swaps,
        "makespan_s": round(makespan_s, 3),
        "late": late,
    }
