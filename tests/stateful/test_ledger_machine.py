"""The state machine on the real ledger, within a fixed budget: 1,000 examples here and 1,000 seeds in `tests/sim`.

`test_fuzz.py` goes on without a budget, `test_planted_bugs.py` proves that the machine would notice if the ledger were
wrong.
"""

from __future__ import annotations

import pytest

from tests.stateful.budget import run_machine


@pytest.mark.parametrize("part", range(4))
@pytest.mark.timeout(300)
def test_the_ledger_keeps_its_promises(part: int) -> None:
    run_machine(seed=part, examples=250)
