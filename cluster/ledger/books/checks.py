"""The invariants, as code: what must be true between any two events. Recomputed from the ground, not from indexes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.ledger.books import server_moves, stops
from cluster.ledger.books.queue import INFINITY
from cluster.ledger.books.shapes import UNIT, conflicts
from cluster.ledger.states import ReplicaState

if TYPE_CHECKING:
    from cluster.ledger.books.placement import Node
    from cluster.ledger.books.pool import Pool
    from cluster.ledger.books.records import Model, Replica

STARTING, READY = ReplicaState.STARTING, ReplicaState.READY
DRAINING, ASLEEP = ReplicaState.DRAINING, ReplicaState.ASLEEP
UNLOADING, STOPPING = ReplicaState.UNLOADING, ReplicaState.STOPPING


def check(pool: Pool) -> None:
    """Raise `AssertionError` with the first broken invariant. Changes nothing; costs a pass over everything."""
    assert not pool.undecided, "the decision tree did not come to an end"
    replicas = [replica for model in pool.models.values() for replica in model.replicas]
    for replica in replicas:
        _check_replica(pool, replica)
    for model in pool.models.values():
        _check_model(pool, model)
    for node in pool.book.nodes.values():
        _check_node(node, [replica for replica in replicas if replica.place.node == node.name])
        if not (pool.is_recovering or node.has_host_room(node.host)):
            _check_crowded(node)
    _check_requests(pool, replicas)
    _check_claims(pool, replicas)
    server_moves.check(pool)
    if pool.spec.capacity:
        resident = {replica.model.name for replica in replicas if replica.is_placed}
        forced = any(replica.adopted for replica in replicas)
        assert len(resident) <= max(pool.spec.capacity, pool.capacity_was) or forced, (
            f"{len(resident)} resident models, capacity {pool.spec.capacity}"
        )


def _check_replica(pool: Pool, replica: Replica) -> None:
    held = len(replica.leases)
    assert replica.state is not ReplicaState.COLD, f"{replica} is cold and still on the books"
    assert held == 0 or replica.state.may_hold_leases, f"{replica} holds leases in a state that may not"
    if replica.told_to_stop and _is_settled(pool, replica.model):
        assert replica.state.is_going, f"{replica} was told to stop, and serves"
    assert stops.before(pool.book, replica) == stops.find_before(pool.book, replica), f"{replica}: stale notes on stops"
    if replica.state is STOPPING:
        busy = [each for each in stops.before(pool.book, replica) if each.leases and _may_be_stopped(pool, each)]
        assert not busy, f"{replica} is to stop, and Serve may stop {busy} in its stead"
    slots = sorted([slot for lease in replica.leases for slot in lease.slots] + replica.free)
    assert [each.index for each in replica.leases] == list(range(held)), f"{replica}: its leases are not where they say"
    assert slots == list(range(replica.slots)), f"{replica}: slots {slots} are not each free or leased once"
    assert list(replica.model.replicas) == sorted(replica.model.replicas, key=lambda each: each.age), (
        f"the replicas of {replica.model.name} are not in the order of their age"
    )
    assert (replica.uid is None) == (replica.state is STARTING), f"{replica} is in use without a process, or has one"
    if pool.keeps_replicas and _is_settled(pool, replica.model):
        assert held or replica.state is not DRAINING, f"{replica} has drained and its engine does not end"
    assert replica.is_placed or replica.state in (STARTING, ASLEEP, UNLOADING, STOPPING), f"{replica} has no place"
    _check_sleeper(pool, replica)
    assert (replica in pool.asleep) == (replica.state is ASLEEP), f"{replica} is wrongly (not) listed as asleep"
    if replica.uid is not None:
        assert pool.replicas.get(replica.uid) is replica, f"{replica} is not found by its id"
    assert (replica in pool.idle) == (replica.state is READY and not held), f"{replica} is wrongly (not) listed as idle"


def _may_be_stopped(pool: Pool, replica: Replica) -> bool:
    """Serve may choose this one among those that it was asked to stop and has not told yet.

    It may not where so many others go before it for certain: what came unasked elsewhere goes in the place of one.
    """
    others = [each for each in replica.model.replicas if each is not replica and not each.told_to_stop]
    to_stop = sum(1 for each in others if each.state is STOPPING)
    return sum(1 for each in others if not stops.may_go_before(pool.book, replica, each)) < to_stop


def _check_sleeper(pool: Pool, replica: Replica) -> None:
    """An engine sleeps in a replica without a place, on devices that stay its own to wake on."""
    state, shape = replica.state, replica.place.shape
    assert not replica.engine_sleeps or (state is ASLEEP and not replica.is_placed), f"{replica} is used and sleeps"
    assert not replica.falls_asleep or (state is UNLOADING and replica.is_placed), f"{replica} is to sleep, unordered"
    assert not replica.wakes or state is ReplicaState.LOADING, f"{replica} wakes, unordered"
    holds = replica.is_placed or replica.engine_sleeps or state in (UNLOADING, STOPPING)
    assert holds or not replica.place.devices, f"{replica} has no engine, and has devices {replica.place.devices}"
    if replica.engine_sleeps and not pool.is_recovering:
        assert shape.held <= pool.spec.asleep_device_mib, f"{replica} holds {shape.held} MiB of each device, asleep"


def _check_model(pool: Pool, model: Model) -> None:
    name = model.name
    told = sum(each.told_to_stop and each.state is not ReplicaState.STOPPING for each in model.replicas)
    assert model.told_to_stop == told, f"{name}: {model.told_to_stop} counted as told to stop, {told} are"
    assert model.sleeping == sum(each.engine_sleeps for each in model.replicas), f"{name}: wrongly counted as sleeping"
    assert model.placed == sum(each.is_placed for each in model.replicas), f"{name}: wrongly counted as placed"
    if _is_settled(pool, model):
        assert not (idle := stops.certain(pool.book, model)), f"{idle} have drained and do not stop"
    for state in ReplicaState:
        count = sum(1 for _ in model.in_state(state))
        assert model.counts[state] == count, f"{name}: {model.counts[state]} counted in {state.name}, {count} are"
    rising = sum(each.is_rising for each in model.replicas)
    counted, are = (model.rising, model.serving, model.draining), (rising, rising + model.counts[READY])
    assert counted == (*are, model.counts[DRAINING]), f"{name}: {counted} are counted wrongly"
    free = sum(len(replica.free) for replica in model.in_state(READY))
    leases = [lease for replica in model.replicas for lease in replica.leases]
    leased = sum(len(lease.slots) for lease in leases)
    assert model.free == free, f"{name}: {model.free} slots counted free, {free} are"
    assert model.leased == leased, f"{name}: {model.leased} slots counted leased, {leased} are"
    by_class = [sum(len(lease.slots) for lease in leases if lease.priority == each) for each in (1, 2, 3)]
    assert model.by_priority == by_class, f"{name}: slots by class {model.by_priority} are not {by_class}"
    indexed = {replica: used for used, bucket in enumerate(model.buckets) for replica in bucket}
    truth = {replica: sum(len(each.slots) for each in replica.leases) for replica in model.in_state(READY)}
    assert indexed == truth, f"{name}: READY replicas by use are {truth}, not {indexed}"
    if free:
        first = min(used for replica, used in truth.items() if used < replica.slots)
        assert model.low <= first, f"{name}: free slots below the shelf where the search begins"
        _check_head(pool, model)
    waiting = sum(1 for _ in model.queue)
    assert model.queue.count == waiting, f"{name}: {model.queue.count} counted waiting, {waiting} are"
    assert model.desired == model.desired_sent or pool.is_recovering, f"{name}: a change of desired was not said"
    assert (model in pool.resident) == bool(model.placed), f"{name} is wrongly (not) listed as resident"
    assert (model.claim is not None) == (model in pool.claims), f"{name}: its claim is not listed"


def _is_settled(pool: Pool, model: Model) -> bool:
    """All was done about the model that can be done now; of a very large pool, some may be left for the next event."""
    return not pool.is_recovering and model not in pool.touched


def _check_head(pool: Pool, model: Model) -> None:
    """Nobody waits before free slots, but one who wants more than any replica has free, and those behind it."""
    head = model.queue.head()
    if head is None or not _is_settled(pool, model):
        return
    for replica in model.in_state(READY):
        wanted = min(head.slots, replica.slots)
        assert len(replica.free) < wanted, f"{model.name}: {head.request} waits for {wanted} slots that {replica} has"


def _check_node(node: Node, replicas: list[Replica]) -> None:
    assert set(node.replicas) == set(replicas), f"node {node.name} accounts for {set(node.replicas)}, not {replicas}"
    going = {each for each in replicas if each.state.is_going}
    assert set(node.going) == going, f"node {node.name} lists {set(node.going)} as leaving, not {going}"
    assert node.widest == max(node.gpu, default=0), f"node {node.name}: {node.widest} is not its widest room"
    gpu = [UNIT * (index < node.spec.gpus) for index in range(len(node.gpu))]
    ray = list(gpu)
    cpu, memory = round(node.spec.cpus * UNIT), node.spec.memory_mib
    for replica in replicas:
        shape = replica.place.shape
        for index in replica.place.devices:
            gpu[index] -= shape.per_device
            assert replica in node.tenants[index], f"{replica} is not listed on device {index} of {node.name}"
        for index in replica.place.booked:
            ray[index] -= shape.per_device
        cpu -= shape.cpu
        memory -= shape.memory
    assert node.ray.free == ray, f"node {node.name}: Ray's books have {ray} free, not {node.ray.free}"
    assert (node.gpu, node.cpu, node.memory) == (gpu, cpu, memory), f"node {node.name}: its account does not add up"
    assert node.host == sum(each.place.shape.host for each in replicas), f"host {node.name}: its account is wrong"
    assert sum(map(len, node.tenants)) == sum(len(each.place.devices) for each in replicas), f"ghosts on {node.name}"
    _check_devices(node)
    if node.is_over():
        assert node.excused or not node.present or any(each.adopted for each in replicas), (
            f"node {node.name} is over its budget: gpu {gpu}, cpu {cpu}, memory {memory}"
        )


def _check_crowded(node: Node) -> None:
    """No engine sleeps on for nobody where its host has no room for it, unless that is being made."""
    for_nobody = [
        each
        for each in node.replicas
        if each.engine_sleeps and not (each.model.queue.count or each.model.order or each.model.claim)
    ]
    being_made = any(each.state in (UNLOADING, STOPPING) for each in node.replicas)
    assert not for_nobody or being_made, f"{for_nobody} sleep, though their host has no room for them"


def _check_devices(node: Node) -> None:
    """What engines were told to load on is theirs alone: no share is given out twice, and groups are kept apart."""
    for index, tenants in enumerate(node.tenants):
        told = [each for each in tenants if each.ordered and not each.adopted and not each.strayed]
        used = sum(each.place.shape.per_device for each in told)
        assert used <= UNIT, f"device {index} of {node.name} is given to {told}"
        for one in told:
            met = [each for each in told if conflicts(one.place.shape, each.place.shape)]
            assert not met, f"{one} meets {met} of its group on device {index} of {node.name}"


def _check_requests(pool: Pool, replicas: list[Replica]) -> None:
    queued, leased = len(pool.waiters), len(pool.leases) + len(pool.servers.leases)
    total = queued + leased + pool.finished + pool.rejected
    assert pool.submitted == total, (
        f"{pool.submitted} submitted, but {queued} queued + {leased} leased + {pool.finished} finished "
        f"+ {pool.rejected} rejected"
    )
    assert not pool.waiters.keys() & pool.leases.keys(), "a request waits and holds a lease"
    by_replica = {lease.request: lease for replica in replicas for lease in replica.leases}
    assert by_replica == pool.leases, "the leases of the replicas are not the leases of the pool"
    by_model = {waiter.request: waiter for model in pool.models.values() for waiter in model.queue}
    assert by_model == pool.waiters, "the waiters of the models are not the waiters of the pool"
    expected = {model: deadline for deadline, _, model in pool.expected if deadline == model.gives_up_at}
    for model in pool.models.values():
        first = min((each.deadline for each in model.queue), default=INFINITY)
        assert model.queue.first_deadline() == first, f"{model.name}: the first deadline is {first}, and not known"
        assert first == INFINITY or expected.get(model, INFINITY) <= first, f"{model.name}: no watch on its deadlines"
    generations = [lease.generation for lease in pool.leases.values()]
    assert len(set(generations)) == len(generations), "two leases have the same generation"


def _check_claims(pool: Pool, replicas: list[Replica]) -> None:
    for model in pool.claims:
        claim = model.claim
        assert claim is not None, f"{model.name} is listed with a claim that it has not"
        assert claim.victims, f"{model.name}: a claim without victims waits for nothing"
        assert model.queue.count or model.order, f"{model.name}: a claim for nobody"
        for victim in claim.victims:
            assert victim.claim is claim, f"{victim} is a victim of two claims"
            assert stops.is_going(pool.book, victim), f"{victim} was chosen, and stays, for others of its model stay"
    for replica in replicas:
        claim = replica.claim
        assert claim is None or (claim.model.claim is claim and replica in claim.victims), f"{replica}: a dead claim"
    marks = sum(len(node.marked) for node in pool.book.nodes.values())
    promised = sum(len(model.claim.places) for model in pool.claims if model.claim is not None)
    assert marks == promised, f"{marks} earmarks for {promised} promised places"
