"""Several logical GPUs need a Ray of their own, and a process has one Ray: so those tests run in other ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.timeout(200)
@pytest.mark.parametrize("name", ["two_devices.py", "four_devices.py", "two_nodes.py"])
def test_engines_run_on_the_devices_that_the_ledger_assigned(name: str):
    file = Path(__file__).with_name(name)
    # Ray tells the processes that it starts where it is; this one is to have another.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)],
        cwd=file.parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]
