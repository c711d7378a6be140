"""The traces: who asks for what, when, on which cluster. A seeded generator draws each, so a seed is a workload."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from math import cos, pi

from cluster.ledger.rules import policy
from cluster.ledger.specs import ModelSpec, NodeSpec, PoolSpec

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

    @property
    def asked(self) -> list[tuple[str, int, float]]:
        """Every question, whoever asks: model, priority, service time."""
        single = [(model, priority, service_s) for _, model, priority, service_s in self.arrivals]
        return single + [each for session in self.sessions for each in session.questions]

    @property
    def begin_s(self) -> float:
        return min([when for when, *_ in self.arrivals] + [each.start_s for each in self.sessions])

    def bound_s(self, model: str, priority: int) -> float:
        """The bound that a class has by default: times what a swap to the model costs in this world."""
        cost_s = self.load_s[model] + START_S + STOP_S
        return max(policy.BOUND_FLOOR_S[priority - 1], policy.BOUND_SWAPS[priority - 1] * cost_s)

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
