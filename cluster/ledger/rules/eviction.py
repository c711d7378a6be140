"""Which replicas to drain, so that a model gets a place: the least hurtful set of victims on one node.

The search looks at what each node would have once all that is leaving has left and all promises are kept, and adds
victims, cheapest first, until the need fits. It changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple

from cluster.ledger.books import stops
from cluster.ledger.books.packing import packed
from cluster.ledger.books.placement import Book, Node
from cluster.ledger.books.queue import INFINITY
from cluster.ledger.books.shapes import Place, Shape, conflicts
from cluster.ledger.rules import policy, sleepers
from cluster.ledger.rules.policy import Plan, Tier
from cluster.ledger.rules.victims import Standing, Standings
from cluster.ledger.states import ReplicaState

if TYPE_CHECKING:
    from cluster.ledger.books.pool import Pool
    from cluster.ledger.books.records import Model, Replica

# A search looks at no more nodes than this, and at no further one when they hold so many replicas; the next search
# looks at others.
MAX_NODES = 16
MAX_REPLICAS = 1000


class Candidate(NamedTuple):
    """A possible victim. `others` must leave with it, since Serve may stop them first: on any node."""

    tier: Tier
    cost: float
    order: int
    replica: Replica
    others: tuple[Replica, ...] = ()


class Leaver(NamedTuple):
    """A model that may leave altogether."""

    tier: Tier
    cost: float
    order: int
    model: Model


class Prospect:
    """What a node will have free when all that leaves has left, less what is promised.

    `hosts` are the devices, by node and index, where a sharing group already stands; None if it may go anywhere.
    `gone` says of some replicas that they count as gone (True), or that they stay for now although they drain (False).
    """

    def __init__(self, book: Book, node: Node, gone: dict[Replica, bool], hosts: set[tuple[str, int]] | None) -> None:
        self.node = node
        self.hosts = hosts
        self.gpu = list(node.gpu)
        self.device_memory = list(node.device_memory)
        self.cpu, self.memory = node.cpu, node.memory
        self.ray = list(node.ray.free)
        self.gone: dict[Replica, None] = {}
        for replica in node.going:
            # DRAINING counts as leaving, too: reopened it would be only for a waiter of its own.
            if gone.get(replica, replica.claim is not None or stops.is_going(book, replica)):
                self.remove(replica)
        for replica, leaves in gone.items():
            if leaves and replica in node.replicas and replica not in self.gone:
                self.remove(replica)
        for place in node.marked.values():
            self._change(place, -1)

    def remove(self, replica: Replica) -> None:
        self.gone[replica] = None
        self._change(replica.place, 1)

    def restore(self, replica: Replica) -> None:
        del self.gone[replica]
        self._change(replica.place, -1)

    def _change(self, place: Place, sign: int) -> None:
        for index in place.devices:
            self.gpu[index] += sign * place.shape.per_device
            self.device_memory[index] += sign * place.shape.memory_per_device
        for index in place.booked:
            self.ray[index] += sign * place.shape.per_device
        self.cpu += sign * place.shape.cpu
        self.memory += sign * place.shape.memory

    def device_fits(self, index: int, shape: Shape) -> bool:
        if self.hosts is not None and (self.node.name, index) not in self.hosts:
            return False
        if self.gpu[index] < shape.per_device:
            return False
        if self.node.spec.device_memory_mib and self.device_memory[index] < shape.memory_per_device:
            return False
        tenants = self.node.tenants[index]
        return not any(conflicts(each.place.shape, shape) for each in tenants if each not in self.gone)

    def node_fits(self, shape: Shape) -> bool:
        if shape.cpu and self.cpu < shape.cpu:
            return False
        if self.node.spec.memory_mib and self.memory < shape.memory:
            return False
        # Ray must have room for its process beside those that are promised room, wherever their engines stand.
        promised = [place.shape for place in self.node.marked.values()]
        return not self.node.ray.are_asked or packed(self.ray, [*promised, shape]) is not None

    def devices(self, shape: Shape) -> list[int]:
        return [index for index in range(len(self.gpu)) if self.device_fits(index, shape)]

    def fits(self, shape: Shape) -> bool:
        return self.node_fits(shape) and len(self.devices(shape)) >= shape.devices


def find(
    pool: Pool, model: Model, rights: Tier, now: float, bound: bool, gone: dict[Replica, bool], only: Node | None
) -> Plan | None:
    """The least hurtful plan for one replica of a model, on one node, or over those that are looked at."""
    best: Plan | None = None
    least = (Tier.PROTECTED, INFINITY)
    surplus = _surplus(pool, model, gone)
    # Of models that leave altogether no right is asked.
    standings = Standings(pool, model, Tier.PROTECTED if surplus > 0 else rights, now, bound)
    ranked = _evictable(standings, gone) if surplus > 0 else []
    if len(ranked) < surplus:
        return None
    for node in sleepers.usable(pool, model, _nodes(pool) if only is None else [only]):
        for crowd in _crowds(ranked, surplus, node):
            # Each crowd hurts no less than the one before it, and each can clear the node if one can.
            if best is not None and least <= _hurt(crowd):
                break
            plans = _ways(pool, node, standings, rights, gone, crowd)
            if not plans:
                break
            for plan, delay_s in plans:
                hurts = plan.tier, plan.cost + delay_s * max(1, model.queue.count)
                if best is None or hurts < least:
                    best, least = plan, hurts
    pool.looked += standings.count
    return best


def _ways(
    pool: Pool, node: Node, standings: Standings, rights: Tier, gone: dict[Replica, bool], crowd: list[Leaver]
) -> list[tuple[Plan, float]]:
    """The plans for a node, each with what it takes until the model is loaded, as far as that differs between them.

    An engine of the model that sleeps here may wake on its own devices; it ends where it would have to load elsewhere.
    """
    model, found = standings.waiting, []
    for sleeper in sleepers.sleepers_on(model, node) if model.sleeping else ():
        plan = clear(pool, node, standings, rights, gone, crowd, sleeper)
        if plan is not None:
            found.append((plan, model.wake_s or 0.0))
    plan = clear(pool, node, standings, rights, gone, crowd)
    if plan is not None:
        ends = sleepers.in_the_way(pool, model, node) if model.sleeping else None
        victims = plan.victims if ends is None or ends in plan.victims else [*plan.victims, ends]
        loads_s = pool.spec.load_prior_s if model.load_s is None else model.load_s
        found.append((plan._replace(victims=victims), loads_s if model.sleeping else 0.0))
    return found


def _nodes(pool: Pool) -> list[Node]:
    """The nodes that a search looks at."""
    nodes = [node for node in pool.book.nodes.values() if node.present]
    is_small = len(pool.replicas) * min(MAX_NODES, len(nodes)) <= MAX_REPLICAS * len(nodes)
    if is_small and len(nodes) <= MAX_NODES:
        return nodes
    pool.serial += 1
    start = pool.serial * (MAX_NODES if is_small else 1) % len(nodes)
    chosen: list[Node] = []
    seen = 0
    for node in (nodes + nodes)[start : start + min(MAX_NODES, len(nodes))]:
        if seen < MAX_REPLICAS:
            chosen.append(node)
            seen += len(node.replicas)
    return chosen


def _surplus(pool: Pool, model: Model, gone: dict[Replica, bool]) -> int:
    """How many models must leave, besides those that do already, so that this one may come."""
    if not pool.spec.capacity or model.placed:
        return 0
    promised = sum(1 for each in pool.claims if not each.placed and each is not model)
    leaving = sum(1 for each in pool.resident if _is_leaving(each, gone))
    return len(pool.resident) - leaving + promised + 1 - pool.spec.capacity


def _evictable(standings: Standings, gone: dict[Replica, bool]) -> list[Leaver]:
    """The models that may leave with all of their replicas, the least hurtful first."""
    ranked = []
    for index, model in enumerate(standings.pool.resident):
        # To lose the last replica is never mere surplus.
        if _is_leaving(model, gone) or (model.floor and not standings.bound):
            continue
        worst, cost = Tier.LEAVING, 0.0
        for replica in model.placed_replicas():
            standing = standings.of(replica)
            if standing is None:
                break
            worst, cost = max(worst, standing[0]), cost + standing[1]
        else:
            # No right is asked for: who has no replica may take a busy one, and none is PROTECTED before the bound.
            ranked.append(Leaver(Tier.BUSY if worst is Tier.SURPLUS else worst, cost, index, model))
    ranked.sort(key=lambda one: one[:3])
    return ranked


def _crowds(ranked: list[Leaver], surplus: int, node: Node) -> Iterator[list[Leaver]]:
    """Who may leave together for the number of models' sake: the least hurtful, or one led by a model of this node.

    A model that stands here makes room as well: with it one victim may do where the least hurtful would be a second.
    """
    if surplus <= 0:
        yield []
        return
    here = {replica.model for replica in node.replicas}
    for leader in (each for index, each in enumerate(ranked) if index == 0 or each.model in here):
        yield [leader, *[each for each in ranked[:surplus] if each is not leader][: surplus - 1]]


def _is_leaving(model: Model, gone: dict[Replica, bool]) -> bool:
    return all(gone.get(each, each.claim is not None or each.state.is_leaving) for each in model.placed_replicas())


def clear(
    pool: Pool,
    node: Node,
    standings: Standings,
    rights: Tier,
    gone: dict[Replica, bool],
    crowd: list[Leaver],
    wakes: Replica | None = None,
) -> Plan | None:
    """The cheapest victims on one node that make room for a replica of the model; for the one that wakes, if given."""
    shape = standings.waiting.shape
    hosts = pool.book.hosts(shape)
    if wakes is not None:
        own = {(node.name, index) for index in wakes.place.devices}
        hosts = own if hosts is None else own & hosts
    prospect = Prospect(pool.book, node, gone, hosts)
    if wakes is not None and wakes not in prospect.gone:
        prospect.remove(wakes)
    chosen = [replica for each in crowd for replica in each.model.placed_replicas() if replica not in gone]
    for replica in chosen:
        if replica.place.node == node.name and replica not in prospect.gone:
            prospect.remove(replica)
    # Where one of a model's replicas is to serve on though it drains, no other leaves: Serve might pick that one.
    staying = {replica.model for replica, leaves in gone.items() if not leaves}
    candidates = _candidates(standings, node, rights, prospect)
    candidates = [each for each in candidates if each.replica.model not in staying]
    if not _clear_devices(prospect, shape, candidates):
        return None
    for candidate in candidates:
        if prospect.node_fits(shape):
            break
        if candidate.replica not in prospect.gone:
            prospect.remove(candidate.replica)
    if not prospect.fits(shape):
        return None
    taken = [each for each in candidates if each.replica in prospect.gone]
    for candidate in reversed(taken):
        prospect.restore(candidate.replica)
        if not prospect.fits(shape):
            prospect.remove(candidate.replica)
    kept = _fewest(prospect, shape, candidates, [each for each in taken if each.replica in prospect.gone])
    usable = prospect.devices(shape)
    usable.sort(key=lambda index: (prospect.gpu[index], index))
    place = Place(node.name, tuple(sorted(usable[: shape.devices])), shape)
    victims = dict.fromkeys(chosen)
    for each in kept:
        victims |= dict.fromkeys((*each.others, each.replica))
    return Plan(*_hurt([*crowd, *kept]), place, list(victims))


def _hurt(leaving: Sequence[Leaver | Candidate]) -> tuple[Tier, float]:
    """What it means to lose all of these."""
    return max((each.tier for each in leaving), default=Tier.LEAVING), sum(each.cost for each in leaving)


def _fewest(prospect: Prospect, shape: Shape, candidates: list[Candidate], kept: list[Candidate]) -> list[Candidate]:
    """One victim in the place of several, if it makes the room alone and hurts no more than they do together."""
    if len(kept) < 2:
        return kept
    limit = _hurt(kept)
    for each in kept:
        prospect.restore(each.replica)
    free = set(prospect.devices(shape))
    for candidate in candidates:
        if candidate[:2] <= limit and not candidate.others:
            prospect.remove(candidate.replica)
            # It frees no other devices than its own.
            freed = [each for each in candidate.replica.place.devices if each not in free]
            devices = len(free) + sum(1 for each in freed if prospect.device_fits(each, shape))
            if devices >= shape.devices and prospect.node_fits(shape):
                return [candidate]
            prospect.restore(candidate.replica)
    for each in kept:
        prospect.remove(each.replica)
    return kept


def _candidates(standings: Standings, node: Node, rights: Tier, prospect: Prospect) -> list[Candidate]:
    found: list[Candidate] = []
    book = standings.pool.book
    newest_first = sorted(node.replicas, key=attrgetter("started_at", "serial"), reverse=True)
    for order, replica in enumerate(newest_first):
        if replica in prospect.gone:
            continue
        alone = standings.of(replica)
        if alone is None or alone[0] > rights:
            continue
        others = [each for each in stops.with_it(book, replica) if each.claim is None and each not in prospect.gone]
        standing = _standing(standings, [replica, *others]) if others else alone
        if standing is not None and standing[0] <= rights:
            found.append(Candidate(*standing, order, replica, tuple(others)))
    found.sort(key=lambda each: each[:3])
    return found


def _standing(standings: Standings, together: list[Replica]) -> Standing | None:
    """Replicas of one model that can only leave together, as victims: the worst that happens, and all that it costs."""
    pool, now, bound = standings.pool, standings.now, standings.bound
    worst, cost, ready = Tier.LEAVING, 0.0, 0
    for replica in together:
        standing = standings.of(replica)
        if standing is None:
            return None
        worst, cost = max(worst, standing[0]), cost + standing[1]
        ready += replica.state is ReplicaState.READY
    model = together[0].model
    left = model.counts[ReplicaState.READY] - ready
    if ready < 2 or worst is Tier.PROTECTED:
        return worst, cost
    # Each that leaves only for another's sake has to be loaded again for it.
    cost += (ready - 1) * policy.load_time(pool, model)
    if left < model.floor:
        return (Tier.PROTECTED, cost) if bound else None
    if worst is Tier.SURPLUS and model.leased + model.queue.count > left * model.spec.slots:
        # Each of them is surplus, all of them are not.
        ends = policy.turn_end if bound else policy.residency_end
        return None if any(now < ends(pool, each) for each in together) else (Tier.BUSY, cost)
    return worst, cost


def _clear_devices(prospect: Prospect, shape: Shape, candidates: list[Candidate]) -> bool:
    """Remove candidates until enough devices have room, the cheapest devices first."""
    if not shape.gpu:
        return True
    options: list[tuple[Tier, float, int, list[Candidate]]] = []
    on_device: list[list[Candidate]] = [[] for _ in prospect.gpu]
    for candidate in candidates:
        for index in candidate.replica.place.devices:
            on_device[index].append(candidate)
    for index, here in enumerate(on_device):
        removed: list[Candidate] = []
        for candidate in here:
            if prospect.device_fits(index, shape):
                break
            prospect.remove(candidate.replica)
            removed.append(candidate)
        if prospect.device_fits(index, shape):
            options.append((*_hurt(removed), index, removed))
        for candidate in removed:
            prospect.restore(candidate.replica)
    if len(options) < shape.devices:
        return False
    for _, _, _, removed in sorted(options, key=lambda each: each[:3])[: shape.devices]:
        for candidate in removed:
            if candidate.replica not in prospect.gone:
                prospect.remove(candidate.replica)
    return True
