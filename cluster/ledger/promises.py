"""Promises of room: a chosen set of victims stands behind a *claim*.

The room they leave is earmarked, so nobody overtakes, and the claim is taken back, with its victims reopened, if the
waiters leave, if room turns up elsewhere, or for a cheaper way. When that is so, `placing` decides.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.ledger.books import engine_moves, stops
from cluster.ledger.books.records import Claim, Model, Replica
from cluster.ledger.events import PrefetchModel
from cluster.ledger.rules import claims, policy, sleepers
from cluster.ledger.rules.policy import Tier
from cluster.ledger.states import ReplicaState
from cluster.ledger.transitions import SwapBegun

if TYPE_CHECKING:
    from cluster.ledger.books.pool import Pool

READY, DRAINING = ReplicaState.READY, ReplicaState.DRAINING


def promise(pool: Pool, model: Model, plans: list[policy.Plan], now: float, bound: bool, began: float) -> bool:
    """Earmark the places and drain the victims, before any of them is empty.

    If all that is leaving was promised to others already, there is nothing to promise: room will turn up by itself.
    `began` is when room was first promised to these waiters.
    """
    victims = list(dict.fromkeys(victim for plan in plans for victim in plan.victims))
    for plan in plans:
        # What is leaving there anyway makes room as well; it is counted on from now on.
        node = pool.book.node(plan.place.node)
        victims += [each for each in node.replicas if each.claim is None and stops.is_going(pool.book, each)]
    if not victims:
        return False
    claim = model.claim = Claim(model, [plan.place for plan in plans], victims, began)
    claim.look_at = claims.next_look(claim, now)
    claim.marks = [pool.book.mark(each) for each in claim.places]
    pool.claims[model] = None
    for victim in claim.victims:
        victim.claim = claim
    reason = _why_swapped(model, plans, bound)
    names = tuple(victim.uid or "" for victim in claim.victims)
    claim.because = policy.because(pool, model, plans, reason, names, now)
    pool.transitions.append(SwapBegun(model.name, names, reason, claim.because))
    for victim in claim.victims:
        if victim.state is READY:
            pool.quiesce(victim, now, reason)
        elif victim.engine_sleeps:
            engine_moves.demote(pool, victim, now, reason)
    _prepare(pool, model, claim, now)
    pool.touched[model] = None
    return True


def _prepare(pool: Pool, model: Model, claim: Claim, now: float) -> None:
    """Have processes started for the engines to come while the victims drain, where no replica waits for them."""
    seats = sleepers.by_node(model)
    for place in claim.places:
        if sleepers.sleeper_at(model, place) is not None:
            continue
        if not seats[place.node] and pool.keeps_replicas and sleepers.startable(pool, model):
            pool.place(model, pool.asleep_place(place.node), now, for_engine=False)
        else:
            seats[place.node] -= 1
    _prefetch(pool, model, claim)


def _prefetch(pool: Pool, model: Model, claim: Claim) -> None:
    """Have the files of a model read while its victims drain: once for these waiters on each node."""
    for name in dict.fromkeys(each.node for each in claim.places if sleepers.sleeper_at(model, each) is None):
        reader = sleepers.reader_on(pool.book.node(name), model)
        if reader is not None and model.prefetched.get(name) != claim.began:
            model.prefetched[name] = claim.began
            pool.out.append(PrefetchModel(model.name, reader))


def _why_swapped(model: Model, plans: list[policy.Plan], bound: bool) -> str:
    """Why the victims must go, for those who watch."""
    worst = max(plan.tier for plan in plans)
    if worst <= Tier.SURPLUS:
        return worst.name.lower()
    if worst is Tier.LOWER:
        return "class"
    return "operator" if model.order is not None else "bound" if bound else "pays"


def drop(pool: Pool, model: Model, now: float) -> None:
    """Take a promise back. Victims that have not begun to stop are opened again."""
    claim = model.claim
    if claim is None:
        return
    lift(pool, claim)
    reopen_victims(pool, claim, now)
    pool.touched[model] = None


def lift(pool: Pool, claim: Claim) -> None:
    """Take a promise off the books; its victims drain on, for nobody."""
    claim.model.claim = None
    del pool.claims[claim.model]
    for each, mark in zip(claim.places, claim.marks, strict=True):
        pool.book.unmark(each, mark)
    for victim in claim.victims:
        victim.claim = None


def restore(pool: Pool, claim: Claim) -> None:
    """Undo `lift`."""
    claim.model.claim = claim
    pool.claims[claim.model] = None
    claim.marks = [pool.book.mark(each) for each in claim.places]
    for victim in claim.victims:
        victim.claim = claim


def reopen_victims(pool: Pool, claim: Claim, now: float) -> None:
    """Open again those victims of a lifted claim that have not begun to stop, and that nobody else counts on."""
    for victim in claim.victims:
        if victim.claim is None and victim.state is DRAINING:
            reopen_with_others(pool, victim, now)


def reopen_with_others(pool: Pool, replica: Replica, now: float) -> bool:
    """Open a draining replica again, with those that could not leave before it does; False if somebody counts on it."""
    model, group = replica.model, [replica]
    for each in group:
        if each.state is not DRAINING or each.claim is not None or not _may_reopen(pool, each, len(group)):
            return False
        for other in model.replicas:
            if other.state.is_going and other not in group and each in stops.with_it(pool.book, other):
                if other.claim is not None:
                    return False
                group += [other] if other.state is DRAINING and _may_reopen(pool, other) else []
    for each in group:
        pool.reopen(each, now)
    return True


def _may_reopen(pool: Pool, replica: Replica, count: int = 1) -> bool:
    """Nothing but a claim drains it, and it could serve, as one of so many."""
    model = replica.model
    if not replica.has_engine or model.removed or model.unloading or model.serving + count > model.spec.max_replicas:
        return False
    return not stops.is_outdated(pool.book, replica)


def is_on_lost_node(pool: Pool, replica: Replica) -> bool:
    """Its node left the cluster: it drains; what it has left to do it may do."""
    return not pool.book.nodes[replica.place.node].present
