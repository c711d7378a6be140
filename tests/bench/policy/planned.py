"""Carries out a schedule that was made beforehand, in the same simulated cluster as every other scheduler."""

from __future__ import annotations

from collections import deque

from cluster.ledger.events import Command, Event, RequestArrived
from cluster.ledger.specs import PoolSpec
from tests.bench.policy.rivals import Place, Rival
from tests.bench.policy.search import Turn


class Planned(Rival):
    """Each device has its chain of turns; whoever waits is granted in the order that the pool promises."""

    def __init__(self, spec: PoolSpec, chains: list[list[Turn]]) -> None:
        super().__init__(spec)
        self.ageing_s = spec.ageing_s
        self.chains = [deque(chain) for chain in chains]
        self.granted = [0] * len(chains)
        self.on: list[Place | None] = [None] * len(chains)
        self.ranks: dict[str, float] = {}

    def decide(self, event: Event, now: float) -> list[Command]:
        if isinstance(event, RequestArrived):
            self.ranks[event.request] = now + (event.priority - 1) * self.ageing_s
        return super().decide(event, now)

    def settle(self, out: list[Command], now: float) -> None:
        self.line.sort(key=lambda each: self.ranks[each.request])
        for device, chain in enumerate(self.chains):
            place = self.on[device]
            if place is not None and place not in self.places:
                chain.popleft()
                self.granted[device] = 0
                place = self.on[device] = None
            if place is None:
                if chain and self.place_of(chain[0].model) is None and self.start(chain[0].model, out):
                    self.on[device] = self.places[-1]
                continue
            turn = chain[0]
            for request in [each for each in self.line if each.model == turn.model]:
                if not self.can_grant(place) or self.granted[device] >= turn.grants:
                    break
                self.line.remove(request)
                self.grant(request, place, out, now)
                self.granted[device] += 1
            if place.state == "ready" and self.granted[device] >= turn.grants:
                place.state = "draining"
