"""The offline schedules of `bench_policy.py`: their judge finds what is wrong, and the search finds what is best."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import groupby, permutations

import pytest

from cluster.ledger.events import (
    Grant,
    LeaseReleased,
    LoadEngine,
    ReplicaGone,
    ReplicaReady,
    ReplicaStarted,
)
from tests.bench.policy.lines import INFINITY
from tests.bench.policy.planned import Planned
from tests.bench.policy.play import Played, play
from tests.bench.policy.search import Search, Turn
from tests.bench.policy.traces import HIGH, MEDIUM, Session, Trace
from tests.bench.policy.validate import Recorder, faults

Log = list[tuple[float, object]]


def carried_out(trace: Trace, chains: list[list[Turn]]) -> Played:
    spec = trace.spec()
    return play(trace, lambda now: Planned(spec, chains))


def log_of(played: Played) -> Log:
    assert isinstance(played.world, Recorder)
    return list(played.world.log)


def little() -> Trace:
    arrivals = [(0.0, "A", MEDIUM, 2.0), (0.5, "A", MEDIUM, 3.0), (1.0, "B", HIGH, 1.0), (9.0, "A", MEDIUM, 1.0)]
    return Trace("little", arrivals, {"A": 2.0, "B": 3.0}, slots=2)


def without(log: Log, kind: type) -> Log:
    """The log without the first word of a kind."""
    first = next(index for index, (_, said) in enumerate(log) if isinstance(said, kind))
    return log[:first] + log[first + 1 :]


def sooner(log: Log, kind: type, by_s: float) -> Log:
    """The log with the last word of a kind said so much earlier."""
    at, last = [each for each in log if isinstance(each[1], kind)][-1]
    rest = [each for each in log if each[1] is not last]
    place = next(index for index, (now, _) in enumerate(rest) if now > at - by_s)
    return [*rest[:place], (at - by_s, last), *rest[place:]]


def test_what_was_carried_out_is_a_schedule() -> None:
    trace = little()
    assert faults(trace, log_of(carried_out(trace, Search(trace).run()))) == []  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (lambda log: without(log, ReplicaGone), "2 replicas on 1 devices"),
        (lambda log: sooner(log, ReplicaReady, 1.0), "before it can be loaded"),
        (lambda log: without(log, LoadEngine), "before it can be loaded"),
        (lambda log: without(log, ReplicaReady), "does not serve it"),
        (lambda log: without(log, LeaseReleased), "is to stop, and"),
        (lambda log: sooner(log, ReplicaGone, 1.0), "is gone, and served"),
        (lambda log: sooner(log, LeaseReleased, 0.5), "not all as long"),
        (lambda log: [each for each in log if not isinstance(each[1], Grant)], "0 were served"),
    ],
)
def test_the_judge_sees_what_is_no_schedule(spoil: Callable[[Log], Log], word: str) -> None:
    trace = little()
    found = faults(trace, spoil(log_of(carried_out(trace, Search(trace).run()))))  # type: ignore[arg-type]
    assert any(word in each for each in found), found


def test_the_judge_counts_slots_and_devices() -> None:
    trace = little()
    log = log_of(carried_out(trace, Search(trace).run()))
    trace.slots = 1
    assert any("with 1 slots" in each for each in faults(trace, log))  # type: ignore[arg-type]
    twice = [*log, (99.0, ReplicaStarted("A", "A#8", "node")), (99.0, ReplicaStarted("A", "A#9", "node"))]
    assert any("replicas on 1 devices" in each for each in faults(trace, twice))  # type: ignore[arg-type]


def best_of_all(trace: Trace) -> float:
    """The least mean wait of any order in which the models may have their grants, each carried out."""
    letters = [model for _, model, _, _ in trace.arrivals]
    least = INFINITY
    for word in set(permutations(letters)):
        runs = [(model, len(list(run))) for model, run in groupby(word)]
        chain = [Turn(model, count) for model, count in runs[:-1]] + [Turn(runs[-1][0], INFINITY)]
        least = min(least, carried_out(trace, [chain]).figures()["mean_wait_s"])
    return least


@pytest.mark.parametrize("seed", range(12))
def test_the_search_finds_the_best_schedule_of_a_tiny_trace(seed: int) -> None:
    rng = random.Random(seed)
    letters = "AAABBB" if seed % 2 else "AABBCC"
    arrivals = sorted((rng.uniform(0.0, 20.0), model, MEDIUM, rng.uniform(0.5, 6.0)) for model in letters)
    trace = Trace("tiny", arrivals, {"A": 1.0, "B": 2.0, "C": 3.0}, slots=2)
    found = carried_out(trace, Search(trace).run()).figures()["mean_wait_s"]
    assert found <= 1.02 * best_of_all(trace)


def test_the_search_uses_all_devices_and_follows_a_conversation() -> None:
    session = Session(0.0, [("A", MEDIUM, 1.0), ("B", MEDIUM, 1.0), ("C", MEDIUM, 1.0)] * 2, pause_s=1.0)
    trace = Trace("talk", [(2.0, "B", MEDIUM, 3.0)], dict.fromkeys("ABC", 1.0), gpus=2, sessions=[session])
    chains = Search(trace).run()
    assert len(chains) == 2
    played = carried_out(trace, chains)
    assert faults(trace, log_of(played)) == []  # type: ignore[arg-type]
    # The first is loaded when it is asked for; of the others each is loaded before its question.
    assert played.figures()["max_wait_s"] < 2.0
