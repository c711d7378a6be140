"""How long a request will wait, as far as the ledger can tell: for `Retry-After`, and for who asks where he stands.

A wait has two parts. The *place*: until a replica of the model is loaded, and before that until its victims are gone,
their work or their turn is over, or a bound has come; who stands before it in line for a place has his first. The
*line*: until all who stand before it in its model's queue have had a slot; where others wait for the place meanwhile,
the model loses it after its turn, and they have theirs. All of it is told from what was learned (loads, services,
drains). Nothing here changes anything, or is decided upon.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.ledger.books.queue import INFINITY
from cluster.ledger.rules import crowd, policy
from cluster.ledger.states import ReplicaState

if TYPE_CHECKING:
    from cluster.ledger.books.pool import Pool
    from cluster.ledger.books.records import Model, Replica

READY, DRAINING = ReplicaState.READY, ReplicaState.DRAINING

# So many rivals and replicas are looked at; who stands behind a longer line gets a rougher estimate.
MAX_SEEN = 32


def wait_s(pool: Pool, model: Model, priority: int, now: float) -> float:
    """How long a request of a class that came now would wait for a slot, in seconds."""
    ahead = sum(model.queue.counts[:priority])
    if pool.servers.offers(model.name):
        return _on_servers_s(pool, model, ahead)
    rank = now + (priority - 1) * pool.spec.ageing_s
    rivals = [each for each in pool.best_pending(MAX_SEEN) if each is not model and not each.serving]
    line = line_s(model, ahead)
    if rivals:
        line += _cuts(pool, model, line, now) * sum(crowd.stay_s(pool, each, now) for each in rivals)
    return place_s(pool, model, rank, [each for each in rivals if each.place_rank < rank], now) + line


def _on_servers_s(pool: Pool, model: Model, ahead: int) -> float:
    """How long it takes until so many others have had a slot of a server; a swap there counts as nothing."""
    servers = pool.servers.by_model[model.name]
    slots = sum(each.spec.max_concurrent for each in servers)
    busy = sum(len(each.leases) for each in servers)
    return max(0, busy + ahead + 1 - slots) * max(each.drain_s for each in servers) / max(1, slots)


def line_s(model: Model, ahead: int) -> float:
    """How long it takes until so many others have had a slot, once the model is loaded; 0 if there is one free."""
    slots = model.spec.slots * max(1, model.counts[READY])
    busy = model.leased if model.counts[READY] else 0
    return max(0, busy + ahead + 1 - slots) * model.service_s / slots


def _cuts(pool: Pool, model: Model, line: float, now: float) -> int:
    """How often a model whose line is so long will lose its place to others before it has served it."""
    turn_s = pool.spec.turn_swaps * policy.swap_cost(pool, model)
    left_s = max((policy.turn_end(pool, each) - now for each in model.in_state(READY)), default=turn_s)
    return 0 if line <= max(0.0, left_s) else 1 + int((line - max(0.0, left_s)) / max(1.0, turn_s))


def place_s(pool: Pool, model: Model, rank: float, before: list[Model], now: float) -> float:
    """How long it takes until a replica of the model is ready, and those who stand before it have had a place."""
    if model.counts[READY]:
        return 0.0
    load_s = policy.load_time(pool, model)
    if model.rising:
        return min(max(0.0, each.wanted_at + load_s - now) for each in model.rising_replicas())
    if model.claim is not None:
        return max((gone_s(pool, each, now) for each in model.claim.victims), default=0.0) + load_s
    if not model.placed and pool.book.find(model.shape) is not None and policy.has_capacity(pool, model):
        return load_s
    due_s = max(0.0, crowd.due_at(pool, model, now) - now)
    if due_s == INFINITY:
        due_s = policy.bound_s(pool, model, 1 + int((rank - now) / max(1e-9, pool.spec.ageing_s)))
    seen = [each for _, each in zip(range(MAX_SEEN), pool.replicas.values(), strict=False)]
    freed = [_freed_s(pool, each, model, due_s, now) for each in seen if each.is_placed and not each.model.spec.pinned]
    queued = sum(crowd.stay_s(pool, each, now) for each in before if each.claim is None) / max(1, len(freed))
    return min(freed, default=due_s) + queued + load_s


def _freed_s(pool: Pool, replica: Replica, model: Model, due_s: float, now: float) -> float:
    """How long it takes until a replica has left for the model, by itself or because the bound has come."""
    owner = replica.model
    if replica.is_rising:
        loaded_s = max(0.0, replica.wanted_at + policy.load_time(pool, owner) - now)
        return loaded_s + crowd.work_s(pool, owner, now) + pool.stop_s
    if replica.state is not READY:
        other = None if replica.claim is None else replica.claim.model
        return gone_s(pool, replica, now) + (0.0 if other is None or other is model else crowd.stay_s(pool, other, now))
    if not replica.leases and not owner.queue.count:
        return pool.stop_s
    turn_s = max(0.0, policy.turn_end(pool, replica) - now)
    drain_s = policy.drain_time(owner, len(replica.leases))
    return min(policy.busy_time(owner, now), max(due_s, turn_s) + drain_s) + pool.stop_s


def gone_s(pool: Pool, replica: Replica, now: float) -> float:
    """How long it takes until a replica that drains or stops is gone."""
    if replica.state.is_leaving:
        return max(0.0, replica.since + pool.stop_s - now)
    drain_s = policy.drain_time(replica.model, len(replica.leases))
    return max(0.0, replica.since + drain_s - now) + pool.stop_s
