"""One local Ray and one Serve per test session, with one logical GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.pool import local_serve


@pytest.fixture(scope="session")
def port() -> Iterator[int]:
    """The HTTP port of the session's Serve."""
    with local_serve(gpus=1) as port:
        yield port
