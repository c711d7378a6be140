"""What the scheduling policy is worth: twelve traces on a virtual clock, four schedulers, the same simulated cluster.

    python tests/bench/bench_policy.py [--json FILE] [--seed N] [--trace NAME]

The rivals are given every advantage that their idea allows: both drain before they swap, batch as many
requests as there are slots, keep models warm with the same least-recently-used rule, and fill free devices at once.

fifo         one line for all; whoever is first gets its model loaded, and nobody overtakes ("swap on demand").
ready_first  whoever's model is loaded goes first, without any bound; a model is swapped out when nobody uses or
             wants it any more, for the longest waiting.
slotpool     the real ledger with its default parameters.
clairvoyant  no scheduler but a bound below all of them: each model has the whole cluster for itself, as many slots
             as it likes, and is loaded once, from the first arrival of the trace on, since its turn is foreseen.
             Nobody can do better; usually nobody can do nearly as well.

The last column counts the requests that waited longer than the bound of their own class.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cluster.ledger.events import (
    Command,
    Event,
    Grant,
    LeaseReleased,
    LoadEngine,
    ReplicaGone,
    ReplicaReady,
    ReplicaStarted,
    RequestArrived,
    RequestCancelled,
    SetDesired,
)
from cluster.ledger.ledger import Ledger
from cluster.ledger.rules import policy
from cluster.ledger.specs import ModelSpec, NodeSpec, PoolSpec
from tests.sim.world import Request, Scheduler, World

HIGH, MEDIUM, LOW = 1, 2, 3

# What a process takes in the simulated world to be started, and to be gone: Serve's loop and its own time.
START_S, STOP_S = 0.6, 0.3


@dataclass
class Session:
    """A conversation: each question (model, priority, service time) comes `pause_s` after the answer before."""

    start_s: float
    questions: list[tuple[str, int, float]]
    pause_s: float = 1.0


@dataclass
class Trace:
    """Arrivals (time, model, priority, service time) on a cluster, and clients who ask as they are answered.

    Each of `sessions` asks its questions (model, priority, service time) one after another, from its start on, and
    pauses in between. Who asks for a model in `patience_s` gives up after so long and asks again, until he is served:
    what counts is his whole wait.
    """

    name: str
    arrivals: list[tuple[float, str, int, float]]
    load_s: dict[str, float]
    gpus: int = 1
    slots: int = 4
    contended: bool = True
    sessions: list[Session] = field(default_factory=list)
    patience_s: dict[str, float] = field(default_factory=dict)
    bound_s: float = 0.0
    late: dict[str, int] = field(default_factory=dict)

    @property
    def asked(self) -> list[tuple[str, int, float]]:
        """Every question, whoever asks: model, priority, service time."""
        single = [(model, priority, service_s) for _, model, priority, service_s in self.arrivals]
        return single + [each for session in self.sessions for each in session.questions]

    def spec(self) -> PoolSpec:
        models = {
            name: ModelSpec(
                name, slots=self.slots, num_gpus=1.0, max_replicas=1, idle_timeout_s=0.0, load_timeout_s=600.0
            )
            for name in self.load_s
        }
        nodes = {"node": NodeSpec("node", gpus=self.gpus)}
        return PoolSpec(models=models, nodes=nodes, queue_max_size=1_000_000)


# --- traces -------------------------------------------------------------------------------------------------------


def poisson(rng: random.Random, rate: float, start: float, end: float) -> list[float]:
    times, now = [], start
    while (now := now + rng.expovariate(rate)) < end:
        times.append(now)
    return times


def service(rng: random.Random, mean: float) -> float:
    """The length of an answer: spread like real ones, without monsters."""
    return min(4 * mean, max(0.2 * mean, rng.lognormvariate(0.0, 0.6) * mean * 0.84))


def alternating(rng: random.Random) -> Trace:
    """Two models, one device, requests for one and the other in turn."""
    arrivals = [(1.5 * i, "AB"[i % 2], MEDIUM, service(rng, 2.0)) for i in range(400)]
    return Trace("alternating", arrivals, {"A": 3.0, "B": 3.0})


def zipf(rng: random.Random) -> Trace:
    """Twenty models on four devices; the first is asked for twenty times as often as the last."""
    names = [f"m{i:02d}" for i in range(20)]
    weights = [1.0 / (i + 1) for i in range(20)]
    arrivals = [
        (when, rng.choices(names, weights)[0], MEDIUM, service(rng, 2.0)) for when in poisson(rng, 1.0, 0.0, 900.0)
    ]
    return Trace("zipf-20-on-4", arrivals, {name: 2.0 + 0.2 * i for i, name in enumerate(names)}, gpus=4)


def bursty(rng: random.Random) -> Trace:
    """Four models on one device, each asked for in bursts."""
    arrivals = []
    for name in "ABCD":
        for start in poisson(rng, 1 / 45.0, 0.0, 900.0):
            arrivals += [
                (start + rng.uniform(0.0, 5.0), name, MEDIUM, service(rng, 2.0)) for _ in range(rng.randint(3, 12))
            ]
    return Trace("bursty", arrivals, dict.fromkeys("ABCD", 3.0))


def flood(rng: random.Random) -> Trace:
    """Overlapping streams on one model that never pause; now and then a high-priority visitor with three questions."""
    arrivals = [(1.5 * i + rng.uniform(0.0, 1.0), "A", MEDIUM, rng.uniform(3.0, 7.0)) for i in range(600)]
    for start in range(60, 900, 120):
        arrivals += [(start + 3.0 * i, "B", HIGH, rng.uniform(1.0, 2.0)) for i in range(3)]
    return Trace("flood-and-visitor", arrivals, {"A": 2.0, "B": 2.0}, slots=8)


def priorities(rng: random.Random) -> Trace:
    """Three models on one device, all classes mixed."""
    arrivals = [
        (when, rng.choice("AABC"), rng.choices((HIGH, MEDIUM, LOW), (1, 3, 2))[0], service(rng, 2.0))
        for when in poisson(rng, 0.7, 0.0, 900.0)
    ]
    return Trace("priority-mix", arrivals, dict.fromkeys("ABC", 3.0))


def diurnal(rng: random.Random) -> Trace:
    """Six models on two devices; day and night, and each model has its own noon."""
    from math import cos, pi

    arrivals = []
    for index, name in enumerate("ABCDEF"):
        for when in poisson(rng, 0.5, 0.0, 1800.0):
            if rng.random() < 0.5 * (1 + cos(2 * pi * (when / 900.0 - index / 6))) ** 2 / 2:
                arrivals.append((when, name, MEDIUM, service(rng, 2.0)))
    return Trace("diurnal", arrivals, dict.fromkeys("ABCDEF", 4.0), gpus=2)


def skewed(rng: random.Random) -> Trace:
    """93 % of the requests for one model, the rest for a rare one, on one device."""
    arrivals = [
        (when, "B" if rng.random() < 0.07 else "A", MEDIUM, service(rng, 2.0)) for when in poisson(rng, 1.0, 0.0, 900.0)
    ]
    return Trace("skewed-93-7", arrivals, {"A": 3.0, "B": 3.0})


def roomy(rng: random.Random) -> Trace:
    """Three models on four devices: nothing to fight for."""
    arrivals = [(when, rng.choice("ABC"), MEDIUM, service(rng, 2.0)) for when in poisson(rng, 2.0, 0.0, 600.0)]
    return Trace("uncontended", arrivals, dict.fromkeys("ABC", 3.0), gpus=4, contended=False)


def agent(rng: random.Random) -> Trace:
    """A coding agent plans with A and acts with B, twenty rounds, beside a batch of low priority that floods A."""
    arrivals = [(1.0 * i + rng.uniform(0.0, 0.8), "A", LOW, rng.uniform(4.0, 8.0)) for i in range(700)]
    questions = []
    for _ in range(20):
        questions += [("A", MEDIUM, rng.uniform(2.0, 4.0)), ("B", MEDIUM, rng.uniform(4.0, 8.0))]
    session = Session(30.0, questions, pause_s=2.0)
    return Trace("agent-and-batch", arrivals, {"A": 4.0, "B": 4.0}, slots=16, sessions=[session])


def burst_then_calm(rng: random.Random) -> Trace:
    """Two models on one device that carries both well, until a crowd comes to each; then the calm is as before."""
    arrivals = []
    for name in "AB":
        times = poisson(rng, 0.25, 0.0, 900.0) + [150.0 + rng.uniform(0.0, 5.0) for _ in range(45)]
        arrivals += [(when, name, MEDIUM, rng.uniform(3.0, 6.0)) for when in times]
    return Trace("burst-then-calm", arrivals, {"A": 8.0, "B": 8.0})


def impatient(rng: random.Random) -> Trace:
    """A flood on A that never pauses; who wants B gives up after half a minute and asks again."""
    arrivals = [(0.5 * i + rng.uniform(0.0, 0.4), "A", MEDIUM, rng.uniform(3.0, 6.0)) for i in range(1800)]
    arrivals += [(when, "B", MEDIUM, rng.uniform(2.0, 4.0)) for when in poisson(rng, 1 / 32.0, 20.0, 880.0)]
    return Trace("impatient-retry", arrivals, {"A": 4.0, "B": 4.0}, slots=16, patience_s={"B": 30.0})


def five_visitors(rng: random.Random) -> Trace:
    """A flood on one model, and now and then five visitors at once, each to a model of his own."""
    arrivals = [(1.2 * i + rng.uniform(0.0, 1.0), "A", MEDIUM, rng.uniform(3.0, 6.0)) for i in range(750)]
    for start in (100.0, 400.0, 700.0):
        arrivals += [(start + rng.uniform(0.0, 0.5), name, MEDIUM, rng.uniform(1.0, 2.0)) for name in "BCDEF"]
    return Trace("five-visitors", arrivals, dict.fromkeys("ABCDEF", 3.0), slots=8)


TRACES = (
    alternating,
    zipf,
    bursty,
    flood,
    priorities,
    diurnal,
    skewed,
    roomy,
    agent,
    burst_then_calm,
    impatient,
    five_visitors,
)


# --- rivals -------------------------------------------------------------------------------------------------------


@dataclass
class Place:
    """One device's replica, as the rivals see it."""

    model: str
    uid: str = ""
    state: str = "starting"
    leases: dict[str, float] = field(default_factory=dict)
    used: float = 0.0


class Rival:
    """What both rivals share: devices, leases, least-recently-used eviction with a drain before it."""

    def __init__(self, spec: PoolSpec) -> None:
        self.slots = {name: model.slots for name, model in spec.models.items()}
        self.devices = sum(node.gpus for node in spec.nodes.values())
        self.places: list[Place] = []
        self.line: list[RequestArrived] = []
        self.generation = 0

    def next_deadline(self) -> float | None:
        return None

    def decide(self, event: Event, now: float) -> list[Command]:
        out: list[Command] = []
        if isinstance(event, RequestArrived):
            self.line.append(event)
        elif isinstance(event, RequestCancelled):
            self.line = [each for each in self.line if each.request != event.request]
        elif isinstance(event, LeaseReleased):
            for place in self.places:
                if place.leases.pop(event.request, None) is not None:
                    place.used = now
        elif isinstance(event, ReplicaStarted):
            next(each for each in self.places if each.model == event.model and not each.uid).uid = event.replica
            out.append(LoadEngine(event.replica, event.model, ()))
        elif isinstance(event, ReplicaReady):
            next(each for each in self.places if each.uid == event.replica).state = "ready"
        elif isinstance(event, ReplicaGone):
            self.places = [each for each in self.places if each.uid != event.replica]
        self.settle(out, now)
        for place in self.places:
            if place.state == "draining" and not place.leases:
                place.state = "stopping"
                out.append(SetDesired(place.model, 0))
        return out

    def settle(self, out: list[Command], now: float) -> None:
        raise NotImplementedError

    def place_of(self, model: str) -> Place | None:
        return next((each for each in self.places if each.model == model), None)

    def grant(self, request: RequestArrived, place: Place, out: list[Command], now: float) -> None:
        self.generation += 1
        place.leases[request.request] = now
        place.used = now
        out.append(Grant(request.request, request.holder, request.model, place.uid, (0,), self.generation, 0.0, 0.0))

    def can_grant(self, place: Place | None) -> bool:
        return place is not None and place.state == "ready" and len(place.leases) < self.slots[place.model]

    def start(self, model: str, out: list[Command]) -> bool:
        if len(self.places) >= self.devices:
            return False
        self.places.append(Place(model))
        out.append(SetDesired(model, 1))
        return True

    def leaving(self) -> int:
        return sum(1 for each in self.places if each.state in ("draining", "stopping"))


class Fifo(Rival):
    """Swap on demand, in order of arrival. The head of the line waits for its model; all others wait behind it."""

    def settle(self, out: list[Command], now: float) -> None:
        while self.line:
            head = self.line[0]
            place = self.place_of(head.model)
            if self.can_grant(place):
                assert place is not None
                self.grant(self.line.pop(0), place, out, now)
                continue
            if place is None and not self.start(head.model, out) and not self.leaving():
                ready = [each for each in self.places if each.state == "ready"]
                # Idle ones first, then the one that was used the longest time ago.
                victim = min(ready, key=lambda each: (len(each.leases) > 0, each.used), default=None)
                if victim is not None:
                    victim.state = "draining"
            return


class ReadyFirst(Rival):
    """Whoever's model is loaded goes first; a model that nobody uses or wants makes room for the longest waiting."""

    def settle(self, out: list[Command], now: float) -> None:
        waiting = []
        for request in self.line:
            place = self.place_of(request.model)
            if self.can_grant(place):
                assert place is not None
                self.grant(request, place, out, now)
            else:
                waiting.append(request)
        self.line = waiting
        absent = list(dict.fromkeys(each.model for each in waiting if self.place_of(each.model) is None))
        wanted = {each.model for each in waiting}
        for model in list(absent):
            if self.start(model, out):
                absent.remove(model)
        idle = [each for each in self.places if each.state == "ready" and not each.leases and each.model not in wanted]
        idle.sort(key=lambda each: each.used)
        for victim in idle[: max(0, len(absent) - self.leaving())]:
            victim.state = "draining"


# --- measuring ----------------------------------------------------------------------------------------------------


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


def simulate(
    trace: Trace, name: str, make: Callable[[float], Scheduler], kind: type[World] = World
) -> dict[str, float]:
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
    trace.late[name] = sum((each.wait_s or 0.0) > bound_s(trace, each.question) for each in visits)
    end = max((each.granted or 0.0) + each.service_s for each in world.requests.values() if each.granted is not None)
    return figures([each.wait_s or 0.0 for each in visits], world.swaps, end - begin_s(trace))


def bound_s(trace: Trace, question: tuple[str, int, float]) -> float:
    """The bound that a question's class has by default: times what a swap costs in this world."""
    model, priority, _ = question
    cost_s = trace.load_s[model] + START_S + STOP_S
    return max(policy.BOUND_FLOOR_S[priority - 1], policy.BOUND_SWAPS[priority - 1] * cost_s)


def begin_s(trace: Trace) -> float:
    return min([when for when, *_ in trace.arrivals] + [each.start_s for each in trace.sessions])


def figures(waits: list[float], swaps: int, makespan: float) -> dict[str, float]:
    ordered = sorted(waits)
    return {
        "mean_wait_s": round(sum(waits) / len(waits), 3),
        "p95_wait_s": round(ordered[int(0.95 * (len(ordered) - 1))], 3),
        "max_wait_s": round(ordered[-1], 3),
        "swaps": swaps,
        "makespan_s": round(makespan, 3),
    }


def clairvoyant(trace: Trace) -> dict[str, float]:
    """A bound below every scheduler; see the module's docstring. Start and stop of processes count as in the world."""
    begin = begin_s(trace)
    waits, ends = [], []

    def ask(when: float, model: str, service_s: float) -> float:
        ready = max(when, begin + 0.1 + 0.5 + trace.load_s[model])
        waits.append(ready - when)
        ends.append(ready + service_s)
        return ends[-1]

    for when, model, _, service_s in trace.arrivals:
        ask(when, model, service_s)
    for session in trace.sessions:
        when = session.start_s
        for model, _, service_s in session.questions:
            when = ask(when, model, service_s) + session.pause_s
    return figures(waits, len({model for model, *_ in trace.asked}), max(ends) - begin)


def measure(trace: Trace) -> dict[str, object]:
    spec = trace.spec()
    trace.bound_s = max(bound_s(trace, question) for question in trace.asked)
    policies = {
        "fifo": simulate(trace, "fifo", lambda now: Fifo(spec)),
        "ready_first": simulate(trace, "ready_first", lambda now: ReadyFirst(spec)),
        "slotpool": simulate(trace, "slotpool", lambda now: Ledger(spec, epoch="bench", now=now)),
        "clairvoyant": clairvoyant(trace),
    }
    return {"name": trace.name, "bound_s": trace.bound_s, "contended": trace.contended, "policies": policies}


def main() -> None:
    parser = argparse.ArgumentParser(description="Swaps and waits of four schedulers over simulated traces.")
    parser.add_argument("--json", metavar="FILE", help="write the figures to FILE")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--trace", help="run this one only")
    args = parser.parse_args()
    rows = []
    print(f"{'trace':18} {'policy':12} {'mean':>8} {'p95':>8} {'max':>8} {'swaps':>6} {'makespan':>9}   (bound)  late")
    for make in TRACES:
        trace = make(random.Random(args.seed))
        if args.trace not in (None, trace.name):
            continue
        row = measure(trace)
        rows.append(row)
        for name, figure in row["policies"].items():  # type: ignore[attr-defined]
            waits = f"{figure['mean_wait_s']:8.2f} {figure['p95_wait_s']:8.2f} {figure['max_wait_s']:8.2f}"
            rest = f"{figure['swaps']:6d} {figure['makespan_s']:9.1f}   ({trace.bound_s:g})"
            print(f"{trace.name:18} {name:12} {waits} {rest} {trace.late.get(name, 0):5d}")
    if args.json:
        Path(args.json).write_text(json.dumps({"traces": rows}, indent=1))


if __name__ == "__main__":
    main()
