"""The middle of the decision tree: place what fits, and where nothing fits, choose what to drain.

For the victims that are chosen, room is promised (`promises`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.ledger import promises
from cluster.ledger.books import engine_moves
from cluster.ledger.books.placement import Node
from cluster.ledger.books.records import Claim, Model, Replica
from cluster.ledger.books.shapes import Place
from cluster.ledger.rules import autoscale, claims, crowd, eviction, levels, policy, sleepers
from cluster.ledger.rules.policy import Tier
from cluster.ledger.states import ReplicaState

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


def _fulfil(pool: Pool, now: float) -> None:
    """Keep each promise as soon as there is room for all of it, wherever that is, the best waiters' first.

    Room is room: it goes to the first in line that it is enough for, whosever victims made it.
    """
    ranked = sorted(pool.claims, key=_line)
    promised = [model.claim for model in ranked if model.claim is not None]
    for claim in promised:
        promises.lift(pool, claim)
    over = []
    for claim in promised:
        places = _free_places(pool, claim.model, len(claim.places))
        if places is not None:
            _start(pool, claim.model, places, now)
        elif claim.victims:
            promises.restore(pool, claim)
            continue
        over.append((claim, places is None))
    for claim, lost in over:
        pool.touched[claim.model] = None
        if lost:
            # All that was counted on is gone, and yet there is no room: it went to others. Plan anew.
            _go_on(pool, claim.model, claim, now)
    for claim, _ in over:
        promises.reopen_victims(pool, claim, now)


def _line(model: Model) -> tuple[bool, float]:
    """Orders those who want a place, best first. A second replica is no need: it takes what the others leave."""
    return _is_growth(model), model.place_rank


def _go_on(pool: Pool, model: Model, claim: Claim, now: float) -> None:
    """Others took the room of a lifted claim: what leaves all the same is promised in its place, if that is enough."""
    _promise_what_leaves(pool, model, now, claim.began)
    pool.touched[model] = None


def _promise_what_leaves(pool: Pool, model: Model, now: float, began: float) -> bool:
    """Promise what leaves all the same; False if that is not enough."""
    plans = _search(pool, model, now, False, None, {}, Tier.LEAVING)
    return promises.promise(pool, model, plans, now, False, began)


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
    if plans and node is None and (first := _first_in_line(pool, model)) is not None:
        # It would have looked in a moment: what can be had now is its own.
        _choose_for(pool, first, now, None)
        if first.claim is not None:
            pool.touched[model] = None
            return
    if not (plans and promises.promise(pool, model, plans, now, bound, now)) and node is None:
        _look_later(pool, model, now, bound, pool.looked - before)


def _first_in_line(pool: Pool, model: Model) -> Model | None:
    """Who stands before a model in the line for a place, and was promised nothing; None if it is the first."""
    others = [each for each in pool.best_pending(MAX_OFFERS) if each is not model and each.claim is None]
    first = min(others, key=_line, default=model)
    return first if _line(first) < _line(model) else None


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
        promises.drop(pool, model, now)
        promises.promise(pool, model, plans, now, bound, claim.began)


def _take_over(pool: Pool, model: Model, now: float) -> bool:
    """The room that was promised to those who stand behind these waiters is theirs, if it is enough; True if it was."""
    needed = autoscale.missing(pool, model, now)
    behind = [each for each in pool.claims if _line(each) > _line(model)] if needed else []
    for other in behind[:MAX_OFFERS]:
        claim = other.claim
        assert claim is not None, f"{other.name} is on the list of claims without one"
        promises.lift(pool, claim)
        places = _free_places(pool, model, needed)
        if places is not None:
            _start(pool, model, places, now)
        elif not _promise_what_leaves(pool, model, now, now):
            promises.restore(pool, claim)
            pool.room_seen = pool.book.version
            continue
        _go_on(pool, other, claim, now)
        promises.reopen_victims(pool, claim, now)
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
