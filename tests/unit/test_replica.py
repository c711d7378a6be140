"""What a replica does beside its engine: the detour through Serve."""

from __future__ import annotations

import pytest

from cluster.errors import ReplicaGone
from deployments.link import Links
from deployments.replica import Replica
from deployments.supervisor import Supervisor


class WithoutEngine(Supervisor):
    """One that has nothing loaded, and nothing around it."""

    def __init__(self) -> None:
        self.engine = None
        self._model = "m"


async def test_the_detour_without_an_engine_is_refused() -> None:
    bare = object.__new__(Replica)
    bare._supervisor, bare._model, bare._links = WithoutEngine(), "m", Links("here")
    with pytest.raises(ReplicaGone):
        await anext(bare.relay(b"", b""))
