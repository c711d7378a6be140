"""Ray Serve's own rules, as the simulation and the state machine play them; `test_serve_rules` checks each of them.

Which replica Serve stops: what does not run yet, then what is not on the head node, then on the node with the fewest
replicas of all deployments, and there the newest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol, TypeVar


class Stoppable(Protocol):
    """A replica as Serve sees it: `node` is empty as long as it does not run, `number` grows in the order of starts."""

    @property
    def node(self) -> str: ...

    @property
    def number(self) -> int: ...


S = TypeVar("S", bound=Stoppable)


def may_stop(replicas: Iterable[S], everywhere: Mapping[str, int], head: str | None) -> list[S]:
    """Of which one Serve stops if a deployment has one replica too many. `everywhere` counts all replicas by node."""
    replicas = list(replicas)
    starting = [each for each in replicas if not each.node]
    if starting:
        return starting
    rank = {each.node: (each.node == head, everywhere[each.node]) for each in replicas}
    nodes = [node for node in rank if rank[node] == min(rank.values())]
    return [max((each for each in replicas if each.node == node), key=lambda each: each.number) for node in nodes]
