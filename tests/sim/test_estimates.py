"""What the ledger tells a newcomer of his wait, against what then happened, on the traces of `bench_policy.py`."""

from __future__ import annotations

import random
from collections.abc import Callable
from statistics import median
from typing import Any

import pytest

from cluster.ledger.ledger import Ledger
from tests.bench.policy.play import play
from tests.bench.policy.traces import TRACES, Trace, roomy
from tests.sim.world import Request, World

CONTENDED = [each for each in TRACES if each is not roomy]


@pytest.mark.parametrize("make", CONTENDED, ids=lambda each: each.__name__)
def test_half_of_the_estimates_are_within_thirty_percent(make: Callable[[random.Random], Trace]) -> None:
    told: list[tuple[float, Request]] = []

    class Telling(World):
        """Whoever comes is told of his wait first."""

        def submit(self, model: str, service_s: float, *, priority: int = 2, **more: Any) -> Request:
            assert isinstance(self.scheduler, Ledger)
            wait_s = self.scheduler.expected_wait_s(model, priority, self.now)
            request = super().submit(model, service_s, priority=priority, **more)
            assert wait_s is not None
            told.append((wait_s, request))
            return request

    trace = make(random.Random(1))
    spec = trace.spec()
    play(trace, lambda now: Ledger(spec, epoch="e1", now=now), Telling)
    # Within a second of the truth is as good as the truth.
    waits = [(wait_s, each.wait_s) for wait_s, each in told if each.wait_s is not None and each.wait_s >= 1.0]
    assert len(waits) > 50
    error = median(abs(wait_s - true_s) / true_s for wait_s, true_s in waits)
    assert error <= 0.3, f"half of {len(waits)} estimates are off by more than {error:.0%}"
