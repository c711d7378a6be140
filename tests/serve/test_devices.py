"""Several logical GPUs need a Ray of their own, and a process has one Ray: so those tests run in other ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.own_ray import run_tests


@pytest.mark.timeout(200)
@pytest.mark.parametrize("name", ["two_devices.py", "four_devices.py", "two_nodes.py"])
def test_engines_run_on_the_devices_that_the_ledger_assigned(name: str):
    run_tests(Path(__file__).with_name(name), timeout_s=180)
