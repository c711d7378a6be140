"""What a replica is as a victim for a model that waits: how much it hurts, in a tier and a cost within the tier.

Most of that is the same for all replicas of a model, so a search (`rules.eviction`) asks it once of each model, and
then once of each replica: it may meet ten thousand of them. Nothing here changes the state.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.ledger.books.queue import INFINITY
from cluster.ledger.rules import policy
from cluster.ledger.rules.policy import Tier
from cluster.ledger.states import ReplicaState

if TYPE_CHECKING:
    from cluster.ledger.books.pool import Pool
    from cluster.ledger.books.records import Model, Replica

READY, DRAINING = ReplicaState.READY, ReplicaState.DRAINING

#: A tier, and the cost in there.
Standing = tuple[Tier, float]


class Verdict:
    """What is the same for all READY replicas of a model: which tiers they may have.

    `may_idle`: one without leases is IDLE. `is_surplus`: each alone is. Else it is `busy`, None if it must stay;
    but it stays for `stay_s` after its load, and if somebody who waited for it (the first since `first_since`) is to be
    served first (`policy.gate`). `harms` is what its loss costs, by the number of its leases.
    """

    __slots__ = ("busy", "first_since", "harms", "is_surplus", "may_idle", "stay_s")

    def __init__(self, pool: Pool, model: Model, waiting: Model, bound: bool, stands_back: int) -> None:
        ready = model.counts[READY]
        spare = ready > model.floor
        self.may_idle = spare and not model.queue.count
        self.is_surplus = spare and ready > 1 and model.leased + model.queue.count <= (ready - 1) * model.spec.slots
        self.busy: Tier | None = Tier.BUSY
        self.stay_s = -INFINITY
        self.first_since = INFINITY
        self.harms: dict[int, float] = {}
        promised = bound and policy.is_promised(pool, waiting)
        if model.queue.count or not promised:
            self.stay_s = policy.turn_s(pool, model)
        if spare and policy.best_class(waiting) < policy.best_class(model):
            self.busy = Tier.LOWER
        elif bound:
            self.busy = Tier.BUSY if spare else Tier.PROTECTED
            # A promise stands back for nobody but who is due as well.
            if not promised or pool.now >= policy.bound_at(pool, model):
                ahead = (head.since for head in model.queue.heads() if head.priority <= stands_back)
                self.first_since = min(ahead, default=INFINITY)
        elif spare:
            self.stay_s = max(self.stay_s, policy.residency_s(pool, model))
        else:
            self.busy = None


class Standings:
    """What replicas are as victims for one model at one moment: each is judged once in a search, however often met.

    `rights` is the worst tier that may be taken at all.
    """

    __slots__ = ("_gate", "_models", "_replicas", "bound", "now", "pool", "rights", "waiting")

    def __init__(self, pool: Pool, waiting: Model, rights: Tier, now: float, bound: bool) -> None:
        self.pool, self.waiting, self.rights, self.now, self.bound = pool, waiting, rights, now, bound
        # to whose waiters those of this model stand back, and since when
        self._gate = (policy.gate(pool, waiting) if bound else None) or (0, -INFINITY)
        self._models: dict[Model, Verdict | None] = {}
        self._replicas: dict[Replica, Standing | None] = {}

    @property
    def count(self) -> int:
        """How many replicas were looked at."""
        return len(self._replicas)

    def of(self, replica: Replica) -> Standing | None:
        """Its tier and its cost in there; None if it may not be a victim."""
        known = self._replicas
        if replica in known:
            return known[replica]
        standing = known[replica] = self._judge(replica)
        return standing

    def _judge(self, replica: Replica) -> Standing | None:
        state = replica.state
        if not replica.is_placed:
            # What an engine that sleeps holds of its devices costs nobody more than the quick way back.
            holds = replica.engine_sleeps and replica.place.shape.held
            return (Tier.LEAVING, 0.0) if holds else None
        if state is not READY:
            leaves = replica.claim is None and (state is DRAINING or state.is_leaving)
            return (Tier.LEAVING, 0.0) if leaves else None
        model = replica.model
        verdict = self._models[model] if model in self._models else self._look_at(model)
        if verdict is None:
            return None
        if verdict.may_idle and not replica.leases:
            return Tier.IDLE, 1.0 / (1.0 + self.now - replica.idle_since)
        if verdict.is_surplus:
            return Tier.SURPLUS, 1.0 + len(replica.leases)
        tier = verdict.busy
        if tier is None or tier > self.rights or self.now < replica.loaded_at + verdict.stay_s:
            return None
        if verdict.first_since < max(self._gate[1], replica.loaded_at):
            return None
        leases = len(replica.leases)
        if leases not in verdict.harms:
            verdict.harms[leases] = policy.harm(self.pool, replica, self.waiting, self.now)
        return tier, verdict.harms[leases]

    def _look_at(self, model: Model) -> Verdict | None:
        """None: none of its READY replicas may be a victim. While one starts, Serve would stop that in their stead."""
        pool, waiting, now, bound = self.pool, self.waiting, self.now, self.bound
        stays = model is waiting or model.rising or policy.is_held(pool, model, now, bound)
        verdict = self._models[model] = None if stays else Verdict(pool, model, waiting, bound, self._gate[0])
        return verdict
