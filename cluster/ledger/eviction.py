"""Which doors to close, so that a model gets in: the least hurtful set of victims on one node.

The search looks at what each node would have once all that is leaving has left and all promises are kept, and adds
victims, cheapest first, until the need fits. It changes nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from cluster.ledger import policy
from cluster.ledger.placement import Node, Place, Shape, mates
from cluster.ledger.policy import Tier
from cluster.ledger.states import ReplicaState

if TYPE_CHECKING:
    from cluster.ledger.pool import Pool
    from cluster.ledger.records import Model, Replica

# A search looks at no more nodes than this; the next one goes on where it ended.
MAX_NODES = 16


class Plan(NamedTuple):
    """A place, who must leave for it, and how much that hurts."""

    tier: Tier
    cost: float
    place: Place
    victims: list[Replica]


class Candidate(NamedTuple):
    tier: Tier
    cost: float
    serial: int
    replica: Replica


class Prospect:
    """What a node will have free when all that leaves has left, less what is promised."""

    def __init__(self, node: Node, gone: dict[Replica, None]) -> None:
        self.node = node
        self.gpu = list(node.gpu)
        self.device_memory = list(node.device_memory)
        self.cpu, self.memory = node.cpu, node.memory
        self.gone: dict[Replica, None] = {}
        for replica in node.replicas:
            # DRAINING counts as leaving, too: reopened it would be only for a waiter of its own.
            if replica in gone or replica.claim is not None or replica.state >= ReplicaState.DRAINING:
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
        self.cpu += sign * place.shape.cpu
        self.memory += sign * place.shape.memory

    def device_fits(self, index: int, shape: Shape) -> bool:
        if self.gpu[index] < shape.per_device:
            return False
        if self.node.spec.device_memory_mib and self.device_memory[index] < shape.memory_per_device:
            return False
        tenants = self.node.tenants[index]
        return not any(mates(each.place.shape, shape) for each in tenants if each not in self.gone)

    def node_fits(self, shape: Shape) -> bool:
        if shape.cpu and self.cpu < shape.cpu:
            return False
        return not self.node.spec.memory_mib or self.memory >= shape.memory

    def devices(self, shape: Shape) -> list[int]:
        return [index for index in range(len(self.gpu)) if self.device_fits(index, shape)]

    def fits(self, shape: Shape) -> bool:
        return self.node_fits(shape) and len(self.devices(shape)) >= shape.devices


def find(
    pool: Pool, model: Model, rights: Tier, now: float, bound: bool, gone: dict[Replica, None], only: Node | None
) -> Plan | None:
    """The least hurtful plan for one replica of a model, on one node, or over those that are looked at."""
    best: Plan | None = None
    crowd: list[Replica] = []
    if pool.spec.capacity and not model.replicas:
        found = _make_capacity(pool, model, now, bound)
        if found is None:
            return None
        crowd = found
    for node in _nodes(pool) if only is None else (only,):
        plan = clear(pool, node, model, rights, now, bound, gone, crowd)
        if plan is not None and (best is None or plan[:2] < best[:2]):
            best = plan
    return best


def _nodes(pool: Pool) -> list[Node]:
    nodes = [node for node in pool.book.nodes.values() if node.present]
    if len(nodes) <= MAX_NODES:
        return nodes
    pool.serial += 1
    start = pool.serial * MAX_NODES % len(nodes)
    return (nodes + nodes)[start : start + MAX_NODES]


def _make_capacity(pool: Pool, model: Model, now: float, bound: bool) -> list[Replica] | None:
    """All replicas of the models that must leave so that one more may come; None if that cannot be."""
    promised = sum(1 for each in pool.claims if not each.replicas)
    leaving = sum(1 for each in pool.resident if _is_leaving(each))
    surplus = len(pool.resident) - leaving + promised + 1 - pool.spec.capacity
    crowd: list[Replica] = []
    if surplus <= 0:
        return crowd
    ranked = []
    for index, each in enumerate(pool.resident):
        if each is model or _is_leaving(each):
            continue
        standings = [policy.standing(pool, replica, model, now, bound) for replica in each.replicas]
        # To lose the last replica is never mere surplus.
        if any(one is None for one in standings) or (each.floor and not bound):
            continue
        worst = max(one[0] for one in standings if one is not None)
        if worst is Tier.SURPLUS:
            worst = Tier.BUSY
        ranked.append((worst, sum(one[1] for one in standings if one is not None), index, each))
    if len(ranked) < surplus:
        return None
    for _, _, _, each in sorted(ranked, key=lambda one: one[:3])[:surplus]:
        crowd += each.replicas
    return crowd


def _is_leaving(model: Model) -> bool:
    return all(each.claim is not None or each.state.is_leaving for each in model.replicas)


def clear(
    pool: Pool,
    node: Node,
    model: Model,
    rights: Tier,
    now: float,
    bound: bool,
    gone: dict[Replica, None],
    crowd: list[Replica],
) -> Plan | None:
    """The cheapest victims on one node that make room for a replica of the model."""
    shape = model.shape
    prospect = Prospect(node, gone)
    chosen = {each: (Tier.IDLE, 1.0) for each in crowd if each not in gone}
    for replica in chosen:
        if replica.place.node == node.name and replica not in prospect.gone:
            prospect.remove(replica)
    hosts = pool.book.hosts(shape)
    candidates = _candidates(pool, node, model, rights, now, bound, prospect)
    if not _clear_devices(prospect, shape, candidates, hosts):
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
        usable = [index for index in prospect.devices(shape) if hosts is None or (node.name, index) in hosts]
        if not prospect.node_fits(shape) or len(usable) < shape.devices:
            prospect.remove(candidate.replica)
    usable = [index for index in prospect.devices(shape) if hosts is None or (node.name, index) in hosts]
    usable.sort(key=lambda index: (prospect.gpu[index], index))
    place = Place(node.name, tuple(sorted(usable[: shape.devices])), shape)
    kept = [each for each in taken if each.replica in prospect.gone]
    tier = max((each.tier for each in kept), default=Tier.LEAVING)
    if crowd:
        tier = max(tier, Tier.IDLE)
    cost = sum(each.cost for each in kept)
    return Plan(tier, cost, place, list(chosen) + [each.replica for each in kept])


def _candidates(
    pool: Pool, node: Node, model: Model, rights: Tier, now: float, bound: bool, prospect: Prospect
) -> list[Candidate]:
    found: list[Candidate] = []
    newer: dict[Model, tuple[Tier, float] | None] = {}
    # Serve stops a model's newest replica first, so an older one is a victim only behind all that are newer here.
    for replica in sorted(node.replicas, key=lambda each: -each.serial):
        if replica in prospect.gone:
            continue
        standing = policy.standing(pool, replica, model, now, bound)
        if replica.state is ReplicaState.READY:
            before = newer.get(replica.model, (Tier.LEAVING, 0.0))
            if standing is not None:
                standing = None if before is None else (max(standing[0], before[0]), standing[1] + before[1])
            newer[replica.model] = standing
        if standing is not None and standing[0] <= rights:
            found.append(Candidate(*standing, -replica.serial, replica))
    found.sort(key=lambda each: each[:3])
    return found


def _clear_devices(
    prospect: Prospect, shape: Shape, candidates: list[Candidate], hosts: set[tuple[str, int]] | None
) -> bool:
    """Remove candidates until enough devices have room, the cheapest devices first."""
    if not shape.gpu:
        return True
    options: list[tuple[Tier, float, int, list[Candidate]]] = []
    for index in range(len(prospect.gpu)):
        if index >= prospect.node.spec.gpus or (hosts is not None and (prospect.node.name, index) not in hosts):
            continue
        removed: list[Candidate] = []
        for candidate in candidates:
            if prospect.device_fits(index, shape):
                break
            if index in candidate.replica.place.devices:
                prospect.remove(candidate.replica)
                removed.append(candidate)
        if prospect.device_fits(index, shape):
            worst = max((each.tier for each in removed), default=Tier.LEAVING)
            options.append((worst, sum(each.cost for each in removed), index, removed))
        for candidate in removed:
            prospect.restore(candidate.replica)
    if len(options) < shape.devices:
        return False
    for _, _, _, removed in sorted(options, key=lambda each: each[:3])[: shape.devices]:
        for candidate in removed:
            if candidate.replica not in prospect.gone:
                prospect.remove(candidate.replica)
    return True
