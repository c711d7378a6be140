"""One local Ray and one Serve per test session, with one logical GPU."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest

from tests.pool import local_serve

#: Where the pools of this session keep what outlives them: not in the home folder of who runs the tests.
os.environ["XDG_STATE_HOME"] = _state = tempfile.mkdtemp(prefix="sp-state-")


@pytest.fixture(scope="session", autouse=True)
def _remove_state() -> Iterator[None]:
    yield
    shutil.rmtree(_state, ignore_errors=True)


@pytest.fixture(scope="session")
def port() -> Iterator[int]:
    """The HTTP port of the session's Serve."""
    with local_serve(gpus=1) as port:
        yield port
