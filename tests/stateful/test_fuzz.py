"""The state machine and the simulation in turn, with fresh seeds, until somebody interrupts or something breaks.

    SLOTPOOL_FUZZ=1 pytest tests/stateful/test_fuzz.py        (`make fuzz`)

Every seed is printed before it is used; `run_machine(seed, 200)` and `tests.sim.test_simulation.run(seed)` repeat one.
"""

from __future__ import annotations

import itertools
import os
import random

import pytest

from tests.sim.test_simulation import run
from tests.stateful.budget import run_machine

SIMULATIONS = 100


@pytest.mark.skipif(not os.environ.get("SLOTPOOL_FUZZ"), reason="endless; SLOTPOOL_FUZZ=1 (make fuzz) runs it")
@pytest.mark.timeout(0)
def test_until_interrupted(capsys: pytest.CaptureFixture[str]) -> None:
    fresh = random.SystemRandom()
    for turn in itertools.count(1):
        seed, first = fresh.randrange(1 << 40), fresh.randrange(1 << 40)
        with capsys.disabled():
            print(f"\nturn {turn}: state machine seed {seed}, simulation seeds {first} to {first + SIMULATIONS - 1}")
        run_machine(seed=seed, examples=200)
        for offset in range(SIMULATIONS):
            run(first + offset)
