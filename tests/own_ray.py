"""Tests that need a Ray of their own: a process has one Ray, so they run in other ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run_tests(file: Path, timeout_s: float) -> None:
    """Run a file of tests in a process of its own."""
    # Ray tells the processes that it starts where it is; this one is to have another.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)],
        cwd=Path(__file__).parents[1],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]
