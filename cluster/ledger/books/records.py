"""The ledger's books: models, replicas, leases and claims, with the few operations that keep their indexes true."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import TYPE_CHECKING

from cluster.ledger.books.queue import INFINITY, WaitQueue
from cluster.ledger.books.shapes import Place, Shape, shape_of
from cluster.ledger.specs import ModelSpec
from cluster.ledger.states import ReplicaState
from cluster.ledger.transitions import Because

if TYPE_CHECKING:
    from collections.abc import Iterator

STARTING, LOADING, READY = ReplicaState.STARTING, ReplicaState.LOADING, ReplicaState.READY
DRAINING, UNLOADING = ReplicaState.DRAINING, ReplicaState.UNLOADING
ASLEEP, STOPPING = ReplicaState.ASLEEP, ReplicaState.STOPPING

# An engine that has not woken after so many seconds, and so many times what a load takes, is loaded instead.
WAKE_LIMIT_S = 10.0
WAKE_LIMIT_LOADS = 2.0


class Waiter:
    """One request that waits for slots. `rank` orders all waiters of the pool: lower goes first."""

    __slots__ = (
        "arrived",
        "deadline",
        "fallbacks",
        "holder",
        "keep_alive_s",
        "model",
        "priority",
        "rank",
        "request",
        "since",
        "slots",
        "waits",
    )

    def __init__(
        self,
        request: str,
        holder: str,
        model: Model,
        priority: int,
        deadline: float,
        keep_alive_s: float | None,
        now: float,
        slots: int = 1,
    ) -> None:
        self.request = request
        self.holder = holder
        self.model = model
        self.priority = priority
        self.deadline = deadline
        self.keep_alive_s = keep_alive_s
        self.slots = slots
        self.arrived = now
        self.since = now
        self.rank = now
        self.fallbacks: tuple[str, ...] = ()
        self.waits = True


class Lease:
    """One unique grant of one or more slots of one replica. `index` is where it stands among that one's leases."""

    __slots__ = ("generation", "granted_at", "holder", "index", "priority", "replica", "request", "slots", "waits")

    def __init__(
        self,
        request: str,
        holder: str,
        replica: Replica,
        slots: tuple[int, ...],
        generation: int,
        priority: int,
        granted_at: float,
        waits: tuple[float, float],
    ) -> None:
        self.request = request
        self.holder = holder
        self.replica = replica
        self.slots = slots
        self.generation = generation
        self.index = 0
        self.priority = priority
        self.granted_at = granted_at
        self.waits = waits


class Replica:
    """One replica record. `uid` is the process that announced itself; None as long as none did.

    `wanted_at` is when its load was decided upon: where no replica stays, the start of its process is part of a load.

    `order_due` is when its engine is to be ordered to load, or to end, infinite once it was. `ordered`: it was told to
    load on the devices of its place. `loaded_at` is when it last said that it was loaded.
    `is_placed`: its place is an engine's, which it has or is to load; without, it only takes what one without an engine
    takes of its node.
    `told_to_stop`: Serve has told its process to stop.
    `deaths` counts how often its engine died in short succession. `strayed`: the engine is on other devices than told.
    `host_mib` is what the replica itself takes of its host's memory. `engine_sleeps`: it is ASLEEP with its engine, at
    level 1; `falls_asleep`: it is UNLOADING for that; `wakes`: it is LOADING by waking it. `rested_at` is since when it
    has had nothing loaded. `row` is how it was last shown, None if something of that has changed since.
    """

    __slots__ = (
        "address",
        "adopted",
        "claim",
        "deaths",
        "devices",
        "engine_sleeps",
        "falls_asleep",
        "free",
        "has_engine",
        "host_mib",
        "idle_since",
        "is_placed",
        "leases",
        "loaded_at",
        "model",
        "order_began",
        "order_due",
        "ordered",
        "place",
        "rested_at",
        "revision",
        "row",
        "serial",
        "since",
        "slots",
        "started_at",
        "state",
        "strayed",
        "suspected",
        "told_to_stop",
        "uid",
        "wakes",
        "wanted_at",
    )

    def __init__(self, model: Model, place: Place, serial: int, now: float) -> None:
        self.model = model
        self.place = place
        self.serial = serial
        self.slots = model.spec.slots
        self.revision = model.revision
        self.uid: str | None = None
        self.state = ReplicaState.COLD
        self.since = now
        self.wanted_at = now
        self.idle_since = now
        # in no order; a list, since it is touched by every grant, and smaller than a dictionary
        self.leases: list[Lease] = []
        self.free = list(range(self.slots - 1, -1, -1))
        self.adopted = self.is_placed = False
        self.claim: Claim | None = None
        self.started_at = INFINITY
        # its engine, and what that said of itself
        self.order_began = now
        self.order_due = INFINITY
        self.loaded_at = -INFINITY
        self.ordered = self.strayed = self.has_engine = False
        self.told_to_stop = False
        self.engine_sleeps = self.falls_asleep = self.wakes = False
        self.host_mib = 0
        self.rested_at = now
        self.deaths = 0
        self.address: object = None
        self.devices: tuple[str, ...] | None = None
        self.suspected = False
        self.row: tuple[object, ...] | None = None

    def __repr__(self) -> str:
        return f"<Replica {self.model.name}/{self.uid or '?'} {self.state.name} {self.used}/{self.slots}>"

    def resize(self, slots: int) -> None:
        """Take another number of slots, as long as none is leased."""
        assert not self.leases, f"{self} is in use"
        self.slots = slots
        self.free = list(range(slots - 1, -1, -1))
        self.row = self.model.uses = None

    @property
    def age(self) -> tuple[float, int]:
        """Orders the replicas of a model, oldest first: what has no process yet is going to be the newest."""
        return self.started_at, self.serial

    def overdue_at(self) -> float:
        """When its load has taken too long: counted from the order to load, or from the call for a process."""
        if self.order_due < INFINITY:
            return INFINITY
        limit_s = self.model.spec.load_timeout_s
        if self.wakes:
            limit_s = min(limit_s, max(WAKE_LIMIT_S, WAKE_LIMIT_LOADS * (self.model.load_s or 0.0)))
        return self.order_began + limit_s

    @property
    def is_rising(self) -> bool:
        """It does not serve yet, but will."""
        return self.is_placed and self.state in (STARTING, LOADING)

    @property
    def used(self) -> int:
        """How many of its slots are leased."""
        return self.slots - len(self.free)


class Claim:
    """A promise of places to a model, while its victims drain. All of its replicas are placed at once, or none.

    `began` is when it was first made, whatever its victims since; at `look_at` a better way is looked for. `because`
    is for those who watch.
    """

    __slots__ = ("because", "began", "look_at", "marks", "model", "places", "victims")

    def __init__(self, model: Model, places: list[Place], victims: list[Replica], began: float) -> None:
        self.model = model
        self.places = places
        self.victims = dict.fromkeys(victims)
        self.began = self.look_at = began
        self.because: Because | None = None
        self.marks: list[int] = []


class Order:
    """An operator's load that is under way: it succeeds as a whole or is taken back as a whole."""

    __slots__ = ("batch", "deadline", "replicas")

    def __init__(self, replicas: int, deadline: float) -> None:
        self.replicas = replicas
        self.deadline = deadline
        self.batch: dict[Replica, None] = {}


class Model:
    """One configured model: its spec, its queue, its replicas, and what was learned about it."""

    __slots__ = (
        "armed_at",
        "asleep_device_mib",
        "asleep_host_mib",
        "backoff_until",
        "before",
        "buckets",
        "by_priority",
        "claim",
        "counts",
        "desired_sent",
        "drain_s",
        "draining",
        "ever_loaded",
        "failures",
        "fastest_load_s",
        "free",
        "gap_s",
        "gives_up_at",
        "held_down",
        "keep_alive_s",
        "last_arrival",
        "last_error",
        "last_load",
        "leased",
        "load_s",
        "loaded_at",
        "loads_seen",
        "look_at",
        "low",
        "measured_mib",
        "name",
        "order",
        "peak",
        "peak_since",
        "pending_rank",
        "placed",
        "prefetched",
        "queue",
        "quiet_from",
        "refusing",
        "removed",
        "replicas",
        "resend",
        "rising",
        "service_s",
        "serving",
        "shape",
        "sleep_s",
        "sleeping",
        "spec",
        "told_to_stop",
        "unloading",
        "uses",
        "wake_s",
    )

    def __init__(self, spec: ModelSpec, now: float) -> None:
        self.name = spec.name
        self.spec = spec
        self.queue: WaitQueue[Waiter] = WaitQueue()
        self.replicas: dict[Replica, None] = {}
        # what was found by `stops.before`, until one of them comes, goes or moves
        self.before: dict[Replica, list[Replica]] = {}
        self.counts = [0] * len(ReplicaState)
        # how many will serve, serve or will, and drain: as `recount` found
        self.rising = self.serving = self.draining = 0
        self.buckets: list[OrderedDict[Replica, None]] = [OrderedDict() for _ in range(spec.slots + 1)]
        self.low = 0
        self.free = 0
        self.leased = 0
        self.by_priority = [0, 0, 0]
        self.placed = 0
        # how many replicas Serve has told to stop, of those that are not STOPPING yet
        self.told_to_stop = 0
        self.desired_sent = 0
        self.resend = False
        self.claim: Claim | None = None
        # by node, for whose sake its files were read last: when that claim began
        self.prefetched: dict[str, float] = {}
        # no process is started for it before that without need
        self.quiet_from = -INFINITY
        self.order: Order | None = None
        self.removed = self.unloading = self.held_down = False
        # failures and back-off
        self.failures = 0
        self.refusing = False
        self.backoff_until = 0.0
        self.last_error: str | None = None
        # what was learned
        self.ever_loaded = False
        self.load_s: float | None = None
        # the shortest of its loads by the present configuration, from the order on, and how many were seen
        self.fastest_load_s = INFINITY
        self.loads_seen = 0
        self.loaded_at = -INFINITY
        self.measured_mib: int | None = None
        # of an engine that sleeps: what going to sleep and waking take, what it holds of the host and of each device
        self.sleep_s: float | None = None
        self.wake_s: float | None = None
        self.asleep_host_mib: int | None = None
        self.asleep_device_mib: int | None = None
        self.sleeping = 0
        self.service_s = 0.0
        self.drain_s = 0.0
        self.gap_s = INFINITY
        self.last_arrival = -INFINITY
        self.last_load: deque[tuple[float, float]] = deque(maxlen=4)
        self.keep_alive_s: float | None = None
        # timers and the scheduler's notes
        self.armed_at = INFINITY
        self.gives_up_at = INFINITY
        self.look_at = INFINITY
        self.pending_rank: float | None = None
        self.peak = 0
        self.peak_since = now
        self.shape: Shape = shape_of(spec, None)
        # how much of its replicas was in use when that was last shown, None if something has changed since
        self.uses: tuple[object, ...] | None = None

    def reshape(self) -> None:
        """Recompute the need of one replica, after a new spec or a measurement."""
        self.shape = shape_of(self.spec, self.measured_mib)

    @property
    def revision(self) -> tuple[object, ...]:
        """What a running replica was started with; if it changes, the replica is out of date."""
        spec = self.spec
        return (spec.revision, spec.slots, spec.num_gpus, spec.num_cpus)

    def recount(self) -> None:
        """A replica has changed its state, or its place: count again what every request looks at.

        Among a thousand models a look at `counts` costs more than the sums: it is rarely in the processor's cache.
        """
        starting = sum(1 for each in self.in_state(STARTING) if each.is_placed) if self.counts[STARTING] else 0
        self.rising = starting + self.counts[LOADING]
        self.serving = self.rising + self.counts[READY]
        self.draining = self.counts[DRAINING]

    @property
    def making_room(self) -> bool:
        """One of its replicas gives up its devices, for another model perhaps."""
        if self.counts[DRAINING]:
            return True
        return self.counts[UNLOADING] > 0 and any(each.is_placed for each in self.in_state(UNLOADING))

    @property
    def desired(self) -> int:
        """How many processes Serve should keep, beside those that it has told to stop."""
        return len(self.replicas) - self.counts[STOPPING] - self.told_to_stop

    @property
    def leaving(self) -> int:
        """Replicas that stop, or wait to be stopped: what has no engine and still has a place."""
        asleep = sum(1 for each in self.in_state(ASLEEP) if each.is_placed) if self.counts[ASLEEP] else 0
        return self.counts[STOPPING] + asleep

    @property
    def place_rank(self) -> float:
        """Orders the models that want a place, best first: an operator's order, then as their waiters stand in line."""
        head = self.queue.head()
        return -INFINITY if self.order is not None or head is None else head.rank

    @property
    def is_pinned(self) -> bool:
        return self.spec.pinned or (self.keep_alive_s is not None and self.keep_alive_s < 0)

    @property
    def floor(self) -> int:
        """How many replicas are kept without any demand."""
        return 0 if self.held_down or self.unloading or self.removed else self.spec.min_replicas

    @property
    def idle_timeout_s(self) -> float:
        """How long an idle replica stays; infinite for never."""
        if self.is_pinned:
            return INFINITY
        if self.keep_alive_s is not None:
            return self.keep_alive_s
        return self.spec.idle_timeout_s or INFINITY

    def sort_by_age(self) -> None:
        """Put the replicas in order, oldest first, as Serve sees them; after one of them has told its age."""
        self.replicas = dict.fromkeys(sorted(self.replicas, key=lambda replica: replica.age))
        self.before.clear()

    def in_state(self, state: ReplicaState) -> Iterator[Replica]:
        """Records in a state, oldest first."""
        return (replica for replica in self.replicas if replica.state is state)

    def placed_replicas(self) -> Iterator[Replica]:
        """Records that have the place of an engine, oldest first."""
        return (replica for replica in self.replicas if replica.is_placed)

    def rising_replicas(self) -> Iterator[Replica]:
        """Records that will serve, oldest first."""
        return (replica for replica in self.replicas if replica.is_rising)

    # --- free slots: READY replicas by how many of theirs are leased -------------------------------------------

    def index_by_use(self, replica: Replica) -> None:
        """A replica became READY (again): its free slots count."""
        used = replica.used
        while len(self.buckets) <= replica.slots:
            self.buckets.append(OrderedDict())
        self.buckets[used][replica] = None
        self.free += replica.slots - used
        if used < self.low:
            self.low = used

    def unindex(self, replica: Replica) -> None:
        """A replica is READY no more."""
        used = replica.used
        del self.buckets[used][replica]
        self.free -= replica.slots - used

    def least_used(self) -> Replica:
        """The READY replica with the fewest leased slots that has a free one, ties in turn; there must be one."""
        buckets, index = self.buckets, self.low
        while True:
            bucket = buckets[index]
            if bucket:
                self.low = index
                replica = next(iter(bucket))
                if index < replica.slots:
                    return replica
                # Replicas of an older configuration may be full earlier than others: look behind them.
                for replica in bucket:
                    if index < replica.slots:
                        return replica
            index += 1

    def with_room(self, slots: int) -> Replica | None:
        """The least used READY replica that can give a request all of its slots at once; None if none can now.

        A request that wants more than a replica has gets all of that replica's: it runs its sequences in turns.
        """
        if not self.free:
            return None
        if slots == 1:
            return self.least_used()
        for index in range(self.low, len(self.buckets)):
            for replica in self.buckets[index]:
                if index + min(slots, replica.slots) <= replica.slots:
                    return replica
        return None


def learned(known: float | None, took: float) -> float:
    """What something takes, after it has taken so long once more."""
    return took if known is None else known + 0.3 * (took - known)
