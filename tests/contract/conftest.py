"""Each engine is started once for all tests of this folder, which run engine by engine; what is not installed skips."""

from __future__ import annotations

import importlib.util
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.contract.engines import ENGINES
from tests.contract.entry import Entry, Reference
from tests.contract.pool import OneModel


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "entry" in metafunc.fixturenames:
        # A file of tests for one engine names it.
        only = getattr(metafunc.module, "ONLY", ENGINES)
        params = [_param(entry) for entry in ENGINES.values() if entry.name in only]
        metafunc.parametrize("entry", params, indirect=True, scope="session")


def _param(entry: Entry) -> object:
    missing = [name for name in entry.needs if importlib.util.find_spec(name) is None]
    if not entry.is_there():
        missing.append(f"the environment of {entry.name}")
    skip = pytest.mark.skipif(bool(missing), reason=f"{entry.name}: not installed: {', '.join(missing)}")
    return pytest.param(entry, id=entry.name, marks=[skip, *([pytest.mark.gpu] if entry.on_gpu else ())])


@pytest.fixture(scope="session")
def entry(request: pytest.FixtureRequest) -> Entry:
    found: Entry = request.param
    return found


@pytest.fixture(scope="session")
def folder(entry: Entry, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where an engine's files are made."""
    return tmp_path_factory.mktemp(entry.name)


@pytest_asyncio.fixture(scope="session")
async def running(entry: Entry, folder: Path) -> AsyncIterator[OneModel]:
    """The pool of one model."""
    async with entry.start(entry, folder) as pool:
        yield pool


@pytest_asyncio.fixture
async def engine(running: OneModel) -> AsyncIterator[OneModel]:
    """The same, loaded, whatever another test has done to it; no test may leave a lease."""
    await running.load()
    yield running
    assert not running.ledger.leases


@pytest_asyncio.fixture(scope="session")
async def reference(entry: Entry, folder: Path) -> AsyncIterator[Reference]:
    """What the engine is held against."""
    if entry.reference is None:
        pytest.skip(f"{entry.name}: nothing but the engine itself can tell")
    async with entry.reference(folder) as reference:
        yield reference
