"""How the state machine is run: always from a given seed, so that the same run comes again."""

from __future__ import annotations

from typing import Any

import hypothesis
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.stateful.machine import LedgerMachine


def run_machine(seed: int, examples: int, **more: Any) -> None:
    """Run so many examples of 30 steps each; raises what the first failing one raised, shrunk."""

    class Seeded(LedgerMachine):
        """A class of its own, for Hypothesis keeps the seed on the class."""

    wanted = settings(
        max_examples=examples,
        stateful_step_count=30,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
        **more,
    )
    run_state_machine_as_test(hypothesis.seed(seed)(Seeded), settings=wanted)
