from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.unit.actor.no_ray import Cluster


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    cluster = Cluster(monkeypatch)
    yield cluster
    cluster.close()
