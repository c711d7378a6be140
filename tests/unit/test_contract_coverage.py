"""Every promise in `tests/contract_coverage.md` has a test, and every test that it names is there."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


def rows() -> list[tuple[str, str]]:
    """Promise and tests of every row."""
    lines = (TESTS / "contract_coverage.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").rsplit("|", 1)] for line in lines if line.startswith("|")]
    return [
        (each[0], each[1] if len(each) > 1 else "") for each in cells if each[0] not in ("promise", "---|---", "---")
    ]


@functools.cache
def names_in(file: Path) -> set[str]:
    tree = ast.parse(file.read_text())
    return {each.name for each in ast.walk(tree) if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)}


@pytest.mark.parametrize(("promise", "tests"), rows())
def test_a_promise_has_its_tests(promise: str, tests: str):
    assert tests, f"no test: {promise}"
    for test in tests.split(", "):
        file, _, name = test.partition("::")
        assert name.startswith("test_"), test
        assert (TESTS / file).is_file(), test
        assert name in names_in(TESTS / file), test
