"""The middle of the decision tree: place what fits, and where nothing fits, choose what to drain.

A chosen set of victims stands behind a *claim*: the room they leave is earmarked, so nobody overtakes, and the claim
is taken back, with its victims reopened, if the waiters leave, if room turns up elsewhere, or for a cheaper way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.ledger.books import engine_moves, stops
from cluster.ledger.books.placement import Node
from cluster.ledger.books.records import Claim, Model, Replica
from cluster.ledger.books.shapes import Place
from cluster.ledger.events import PrefetchModel
from cluster.ledger.rules import autoscale, claims, crowd, eviction, levels, policy, sleepers
from cluster.ledger.rules.policy import Tier
from cluster.ledger.states import ReplicaState
from cluster.ledger.transitions import SwapBegun

if TYPE_CHECKING:
    from cluster.ledger.books.pool import Pool

READY, DRAINING = ReplicaState.READY, ReplicaState.DRAINING

# How many waiting models one pass over freed room looks at; the others have timers of their own.
MAX_TRIES = 64
# How many waiting models are offered a replica that has just become idle.
MAX_OFFERS = 2
RETRY_S = 0.25
LOOK_COST_S = 0.002
LOOK_COST_PER_REPLICA_S = 0.000_02
# When a decision has looked at so many replicas, it looks for no more victims: the next one does, at once.
MAX_LOOKED = 1000


def place(pool: Pool, touched: list[Model], now: float) -> None:
    """Place what fits: those who were promised room, then the waiting, best first, then what is kept anyway."""
    pending = [model for model in touched if model.pending_rank is not None]
    floors = [model for model in touched if model in pool.understaffed]
    if pool.room_seen != pool.book.version:
        _fulfil(pool, now)
        pool.room_seen = pool.book.version
        pending = pool.best_pending(MAX_TRIES)
        floors = list(pool.understaffed)[:MAX_TRIES]
    else:
        pending.sort(key=lambda model: model.pending_rank or 0.0)
    # A second replica is no need: it takes what those who have none leave.
    pending.sort(key=lambda model: model.serving > 0)
    for model in pending:
        while needed := autoscale.missing(pool, model, now):
            places = _free_places(pool, model, needed)
            if places is None:
                break
            _start(pool, model, places, now)
    for model in floors:
        while autoscale.floor_missing(pool, model, now) and (places := _free_places(pool, model, 1)) is not None:
            _start(pool, model, places, now)


def _free_places(pool: Pool, model: Model, count: int, node: Node | None = None) -> list[Place] | None:
    """Room for so many replicas of a model, or None if there is not enough for all of them."""
    if not policy.has_capacity(pool, model):
        return None
    places: list[Place] = []
    seats, starts = sleepers.by_node(model), sleepers.startable(pool, model)
    for _ in range(count):
        found = sleepers.can_wake(pool, model, places) if model.sleeping and levels.wakes_sooner(model) else None
        if found is None:
            # A process is started only where no replica waits for an engine.
            found = pool.book.find(model.shape, +seats) if +seats else None
            if found is None and (starts or not pool.keeps_replicas):
                found = pool.book.find(model.shape)
            if found is not None:
                starts -= not seats[found.node]
                seats[found.node] -= 1
            elif model.sleeping:
                found = sleepers.can_wake(pool, model, places)
        if found is None:
            break
        places.append(found)
        pool.book.hold(found, 1)
    for found in places:
        pool.book.hold(found, -1)
    return places if len(places) == count else None


def _start(pool: Pool, model: Model, places: list[Place], now: float) -> None:
    for each in places:
        replica = sleepers.seat_for(model, each)
        if replica is None:
            replica = pool.place(model, each, now)
        else:
            engine_moves.seat(pool, replica, each, now)
        if model.order is not None:
            model.order.batch[replica] = None
    model.held_down = False


# --- claims ---------------------------------------------------------------------------------------------------------


def _promise(pool: Pool, model: Model, plans: list[policy.Plan], now: float, bound: bool, began: float) -> bool:
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


def drop_claim(pool: Pool, model: Model, now: float) -> None:
    """Take a promise back. Victims that have not begun to stop are opened again."""
    claim = model.claim
    if claim is None:
        return
    _lift(pool, claim)
    _reopen_victims(pool, claim, now)
    pool.touched[model] = None


def _lift(pool: Pool, claim: Claim) -> None:
    """Take a promise off the books; its victims drain on, for nobody."""
    claim.model.claim = None
    del pool.claims[claim.model]
    for each, mark in zip(claim.places, claim.marks, strict=True):
        pool.book.unmark(each, mark)
    for victim in claim.victims:
        victim.claim = None


def _restore(pool: Pool, claim: Claim) -> None:
    """Undo `_lift`."""
    claim.model.claim = claim
    pool.claims[claim.model] = None
    claim.marks = [pool.book.mark(each) for each in claim.places]
    for victim in claim.victims:
        victim.claim = claim


def _reopen_victims(pool: Pool, claim: Claim, now: float) -> None:
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


def _fulfil(pool: Pool, now: float) -> None:
    """Keep each promise as soon as there is room for all of it, wherever that is, the best waiters' first.

    Room is room: it goes to the first in line that it is enough for, whosever victims made it.
    """
    ranked = sorted(pool.claims, key=_line)
    promised = [model.claim for model in ranked if model.claim is not None]
    for claim in promised:
        _lift(pool, claim)
    over = []
    for claim in promised:
        places = _free_places(pool, claim.model, len(claim.places))
        if places is not None:
            _start(pool, claim.model, places, now)
        elif claim.victims:
            _restore(pool, claim)
            continue
        over.append((claim, places is None))
    for claim, lost in over:
        pool.touched[claim.model] = None
        if lost:
            # All that was counted on is gone, and yet there is no room: it went to others. Plan anew.
            _go_on(pool, claim.model, claim, now)
    for claim, _ in over:
        _reopen_victims(pool, claim, now)


def _line(model: Model) -> tuple[bool, float]:
    """Orders those who want a place, best first. A second replica is no need: it takes what the others leave."""
    return _is_growth(model), model.place_rank


def _go_on(pool: Pool, model: Model, claim: Claim, now: float) -> None:
    """Others took the room of a lifted claim: what leaves all the same is promised in its place, if that is enough."""
    plans = _search(pool, model, now, False, None, {}, Tier.LEAVING)
    if plans:
        _promise(pool, model, plans, now, False, claim.began)
    pool.touched[model] = None


# --- victims --------------------------------------------------------------------------------------------------------


def choose(pool: Pool, touched: list[Model], now: float) -> None:
    """For those who wait and do not fit: drain the least hurtful victims, if it is time."""
    for model in touched:
        if has_looked_enough(pool):
            # Its time has come all the same, so its timer goes off at once.
            break
        if model.claim is not None:
            if now >= claims.look_at(pool, model.claim):
                _replan(pool, model, model.claim, now, None)
        elif model.pending_rank is not None and now >= model.look_at and not _take_over(pool, model, now):
            _choose_for(pool, model, now, None)
    if not pool.went_idle:
        return
    idle = [replica for replica in pool.went_idle if replica.state is READY and not replica.leases]
    pool.went_idle.clear()
    for index, replica in enumerate(idle):
        if has_looked_enough(pool):
            pool.went_idle.update(dict.fromkeys(idle[index:]))
            return
        node = pool.book.node(replica.place.node)
        for model in _takers(pool):
            if replica.state is READY and model.claim is not None:
                _replan(pool, model, model.claim, now, node)
            elif replica.state is READY:
                _choose_for(pool, model, now, node)


def has_looked_enough(pool: Pool) -> bool:
    """So many replicas were looked at in this decision that whoever else needs victims has to wait for the next."""
    return pool.looked > MAX_LOOKED


def _takers(pool: Pool) -> list[Model]:
    """Who is offered what became idle, best first: some of those who wait for a place, and who wait for victims.

    In a long line of the latter the last look for a better way when their own time comes.
    """
    waiting = pool.best_pending(MAX_OFFERS) + list(pool.claims)
    return sorted(waiting, key=_line)[:MAX_TRIES]


def _choose_for(pool: Pool, model: Model, now: float, node: Node | None) -> None:
    """Look for victims for one model; without a result, note when to look again."""
    bound = _is_due(pool, model, now)
    before = pool.looked
    plans = _search(pool, model, now, bound, node, {})
    pool.room_seen = pool.book.version
    if not (plans and _promise(pool, model, plans, now, bound, now)) and node is None:
        _look_later(pool, model, now, bound, pool.looked - before)


def _replan(pool: Pool, model: Model, claim: Claim, now: float, node: Node | None) -> None:
    """Replace a promise whose victims take their time by a cheaper one, if there is one now."""
    victims = claims.slow(pool, claim, now)
    if node is None:
        claim.look_at = claims.next_look(claim, now)
    if not victims:
        return
    bound = _is_due(pool, model, now)
    for each, mark in zip(claim.places, claim.marks, strict=True):
        pool.book.unmark(each, mark)
    plans = _search(pool, model, now, bound, node, dict.fromkeys(victims, False))
    claim.marks = [pool.book.mark(each) for each in claim.places]
    pool.room_seen = pool.book.version
    if any(plan.victims for plan in plans) and claims.is_cheaper(pool, plans, victims, now):
        drop_claim(pool, model, now)
        _promise(pool, model, plans, now, bound, claim.began)


def _take_over(pool: Pool, model: Model, now: float) -> bool:
    """The room that was promised to those who stand behind these waiters is theirs, if it is enough; True if it was."""
    needed = autoscale.missing(pool, model, now)
    behind = [each for each in pool.claims if _line(each) > _line(model)] if needed else []
    for other in behind[:MAX_OFFERS]:
        claim = other.claim
        assert claim is not None, f"{other.name} is on the list of claims without one"
        _lift(pool, claim)
        places = _free_places(pool, model, needed)
        if places is not None:
            _start(pool, model, places, now)
        elif not _promise(pool, model, _search(pool, model, now, False, None, {}, Tier.LEAVING), now, False, now):
            _restore(pool, claim)
            pool.room_seen = pool.book.version
            continue
        _go_on(pool, other, claim, now)
        _reopen_victims(pool, claim, now)
        pool.touched[model] = None
        return True
    return False


def _is_growth(model: Model) -> bool:
    """It is served already, and wants more."""
    return bool(model.serving) and model.order is None


def _is_due(pool: Pool, model: Model, now: float) -> bool:
    """Its waiters' bound has come so near that somebody must drain, whatever it costs."""
    return not _is_growth(model) and now >= crowd.due_at(pool, model, now)


def _search(
    pool: Pool,
    model: Model,
    now: float,
    bound: bool,
    node: Node | None,
    gone: dict[Replica, bool],
    rights: Tier | None = None,
) -> list[policy.Plan]:
    """The least hurtful plans for all that a model misses; none if that is not enough, or if it is not time.

    `gone` says which replicas count as gone, or as staying, whatever their state; those chosen here are added.
    `rights` are the model's own if they are not given.
    """
    growth = _is_growth(model)
    if rights is None:
        rights = Tier.SURPLUS if growth else Tier.PROTECTED if bound else Tier.BUSY
    plans: list[policy.Plan] = []
    marks: list[int] = []
    needed = autoscale.missing(pool, model, now)
    for _ in range(needed):
        plan = eviction.find(pool, model, rights, now, bound, gone, node)
        if plan is None:
            break
        plans.append(plan)
        marks.append(pool.book.mark(plan.place))
        gone.update(dict.fromkeys(plan.victims, True))
    for plan, mark in zip(plans, marks, strict=True):
        pool.book.unmark(plan.place, mark)
    right = len(plans) == needed and all(_is_right(pool, model, plan, now, bound, growth) for plan in plans)
    return plans if right else []


def _is_right(pool: Pool, model: Model, plan: policy.Plan, now: float, bound: bool, growth: bool) -> bool:
    """It is time to do this to the victims."""
    if growth and plan.tier is Tier.IDLE:
        # A second replica for one model takes a warm one from another only if that was idle for as long as it would
        # take to load it again.
        return all(now - each.idle_since >= policy.load_time(pool, each.model) for each in plan.victims)
    if plan.tier <= Tier.LOWER or bound or model.order is not None:
        return True
    return policy.pays(pool, model, plan, now)


def _look_later(pool: Pool, model: Model, now: float, bound: bool, looked: int) -> None:
    """When to look again: at the bound at the latest, and until then now and then, for the moment may get cheaper.

    A crowd of waiting models looks less often each, so that looking never takes more than a share of the time; nor
    does it where many replicas have to be looked at, as were this time.
    """
    pause = max(RETRY_S, max(LOOK_COST_S, LOOK_COST_PER_REPLICA_S * looked) * pool.pending_count)
    model.look_at = now + pause
    if not bound and model.queue.count:
        model.look_at = max(now + 0.01, min(model.look_at, crowd.due_at(pool, model, now)))
