"""Pools on several nodes: they are lost, and come back; each file has a Ray of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.own_ray import run_tests


@pytest.mark.timeout(420)
@pytest.mark.parametrize("name", ["many_nodes.py", "lost_head.py"])
def test_a_pool_on_several_nodes(name: str):
    run_tests(Path(__file__).with_name(name), timeout_s=400)
