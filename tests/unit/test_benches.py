"""Nothing runs the benchmarks but people: here at least each of them finds what it imports."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

FILES = sorted(Path(__file__).parents[1].joinpath("bench").glob("*.py"))


@pytest.mark.parametrize("name", [file.stem for file in FILES])
def test_a_benchmark_can_be_imported(name: str):
    importlib.import_module(f"tests.bench.{name}")
