"""The ledger's mutable state and its primitive moves. Every index is kept here, and nowhere else.

A move never decides anything: handlers (`requests.py`, `replicas.py`, `operators.py`) and the decision tree
(`tree.py`) call moves; moves note in `touched` and `room` what the tree has to look at again.
"""

from __future__ import annotations

import heapq
import logging
from collections import OrderedDict, deque
from typing import Any

from cluster.ledger.books.memory import Memory
from cluster.ledger.books.placement import Book
from cluster.ledger.books.queue import INFINITY
from cluster.ledger.books.records import Lease, Model, Replica, Waiter
from cluster.ledger.books.servers import Servers
from cluster.ledger.books.shapes import Place, asleep_shape
from cluster.ledger.events import (
    Command,
    Event,
    Grant,
    LeaseReannounced,
    Quiesce,
    Reject,
    Reopen,
    ReplicaReady,
    SetDesired,
)
from cluster.ledger.specs import PoolSpec
from cluster.ledger.states import TRANSITIONS, Cause, ReplicaState
from cluster.ledger.transitions import Because, Moved, Transition

log = logging.getLogger(__name__)

COLD, READY, DRAINING = ReplicaState.COLD, ReplicaState.READY, ReplicaState.DRAINING
STOPPING = ReplicaState.STOPPING

# After so long without any request the pool may be quiet, in seconds.
QUIET_S = 2.0
# A process that vanished is not started again without need for so long, in seconds.
QUIET_AGAIN_S = 60.0

_SINGLES = [(slot,) for slot in range(64)]

# What a replica without an engine is taken to hold of its host's memory as long as none has told.
ASLEEP_MIB = 200


class Pool:
    """All that the ledger knows."""

    def __init__(self, spec: PoolSpec, epoch: str, now: float, recovering_until: float | None) -> None:
        self.spec = spec
        self.epoch = epoch
        self.now = now
        self.recovering_until = recovering_until
        # what a ledger without a configuration keeps for later (see `handlers.early`); None once it has one
        self.early: list[Event] | None = None
        self.early_deadline = INFINITY
        self.recovers_at = now
        self.out: list[Command] = []
        # what this decision changed, for those who watch
        self.transitions: list[Transition] = []
        self.models: dict[str, Model] = {}
        self.resident: dict[Model, None] = {}
        self.replicas: dict[str, Replica] = {}
        self.waiters: dict[str, Waiter] = {}
        self.leases: dict[str, Lease] = {}
        self.book = Book()
        self.servers = Servers()
        self.idle: OrderedDict[Replica, None] = OrderedDict()
        # replicas without an engine, the longest unused first
        self.asleep: OrderedDict[Replica, None] = OrderedDict()
        self.generation = 0
        # the highest generation among leases of a former epoch; see `lease_reannounced`
        self.inherited = 0
        self.serial = 0
        self.submitted = self.finished = self.rejected = 0
        # ids that may still be heard of, though they are history (see `requests.py` and `replicas.py`)
        self.cancelled = Memory(4096, 60.0)
        self.released = Memory(4096, 60.0)
        self.dead_holders = Memory(1024, 600.0)
        self.dead_replicas = Memory(4096, 600.0)
        self.early_ready: dict[str, ReplicaReady] = {}
        # leases that were announced before their replicas, and until when they are kept
        self.orphans: dict[str, dict[str, LeaseReannounced]] = {}
        self.orphans_until = INFINITY
        # learned of the whole pool: what a stop takes, and what a drain takes (at first, what the longest lease took)
        self.stop_s = 0.0
        self.drain_s = 0.0
        self.drained = False
        # what a replica without an engine takes of its host's memory: assumed, then as the last one has said
        self.asleep_mib = ASLEEP_MIB
        # holders that have died, each with the requests that are still to be looked at for being his, the first last
        self.left_behind: deque[tuple[str, list[Waiter | Lease]]] = deque()
        # who is there to ask for models; when to look whether all is quiet, and how many had asked when that was noted
        self.holders: set[str] = set()
        self.quiet_at = INFINITY
        self.quiet_seen = 0
        # a model may be without a process that could be started
        self.lacks_processes = True
        # work for the decision tree
        self.touched: dict[Model, None] = {}
        # the tree went round and round without an end, which is a mistake
        self.undecided = False
        self.understaffed: dict[Model, None] = {}
        self.claims: dict[Model, None] = {}
        self.pending: list[tuple[float, int, Model]] = []
        self.pending_count = 0
        self.went_idle: dict[Replica, None] = {}
        self.changed: dict[Model, None] = {}
        self.room_seen = -1
        # how many replicas were looked at as victims in this decision
        self.looked = 0
        # there was more to look at than one event may: the rest is due at once
        self.is_behind = False
        self.capacity_was = 0
        self.timers: list[tuple[float, int, Model]] = []
        # when the first waiter of each model gives up, or one who has left would have
        self.expected: list[tuple[float, int, Model]] = []
        self.expectations = 0
        # nothing is due before this; it may be too early, never too late
        self.wake = now
        self.turns: dict[str, dict[str, float]] = {}

    @property
    def is_recovering(self) -> bool:
        return self.recovering_until is not None

    # --- waiting -----------------------------------------------------------------------------------------------

    def enqueue(self, waiter: Waiter, now: float) -> None:
        """Let a request wait for its model; whether the tree must look at it is the caller's business."""
        self.waiters[waiter.request] = waiter
        waiter.model.queue.join(waiter, now, self.spec.ageing_s)
        waiter.waits = True
        deadline = waiter.deadline
        if deadline < waiter.model.gives_up_at:
            self._expect(waiter.model, deadline)
            if deadline < self.wake:
                self.wake = deadline

    def dequeue(self, waiter: Waiter) -> None:
        """Take a request out of every line; what becomes of it is the caller's business."""
        del self.waiters[waiter.request]
        waiter.waits = False
        waiter.model.queue.leave(waiter)

    def _expect(self, model: Model, deadline: float) -> None:
        """The first of the waiters of a model gives up then, or has left before."""
        model.gives_up_at = deadline
        self.expectations += 1
        heapq.heappush(self.expected, (deadline, self.expectations, model))

    def next_deadline(self) -> tuple[float, Model | None]:
        """When the next waiter of all gives up, and for which model he waits; infinite if nobody does."""
        while self.expected:
            deadline, _, model = self.expected[0]
            is_live = deadline == model.gives_up_at
            first = model.queue.soonest() if is_live else None
            if first is not None and first.deadline == deadline:
                return deadline, model
            heapq.heappop(self.expected)
            if is_live:
                # Whoever was the first has left.
                model.gives_up_at = INFINITY
                if first is not None:
                    self._expect(model, first.deadline)
        return INFINITY, None

    def reject(self, request: str, holder: str, error: str, message: str, **extras: Any) -> None:
        self.rejected += 1
        self.out.append(Reject(request, holder, error, message, extras))

    # --- leases ------------------------------------------------------------------------------------------------

    def lease(
        self,
        request: str,
        holder: str,
        replica: Replica,
        priority: int,
        now: float,
        waits: tuple[float, float] = (0.0, 0.0),
        generation: int | None = None,
        slots: int = 1,
    ) -> Lease:
        """Take so many free slots of a READY replica, which must have them. The queue is the caller's business."""
        model = replica.model
        free = replica.free
        used = replica.slots - len(free)
        taken = _single(free.pop()) if slots == 1 else tuple(free.pop() for _ in range(slots))
        buckets = model.buckets
        del buckets[used][replica]
        buckets[used + slots][replica] = None
        if used == 0:
            del self.idle[replica]
        model.free -= slots
        model.leased += slots
        if model.leased > model.peak:
            model.peak = model.leased
        model.by_priority[priority - 1] += slots
        if generation is None:
            self.generation = generation = self.generation + 1
        lease = Lease(request, holder, replica, taken, generation, priority, now, waits)
        lease.index = len(replica.leases)
        replica.leases.append(lease)
        replica.row = model.uses = None
        self.leases[request] = lease
        return lease

    def announce(self, lease: Lease) -> None:
        """Tell the holder of its lease; told twice it changes nothing."""
        replica = lease.replica
        queued, loading = lease.waits
        name, uid = replica.model.name, replica.uid or ""
        self.out.append(
            Grant(
                lease.request,
                lease.holder,
                name,
                uid,
                lease.slots,
                lease.generation,
                queued,
                loading,
                replica.address,
                replica.place.devices,
            )
        )

    def hand_over(self, lease: Lease, waiter: Waiter, now: float, waits: tuple[float, float]) -> Lease:
        """Slots go straight from one request to one that waits for as many: the replica is as full as before."""
        replica = lease.replica
        model = replica.model
        request = lease.request
        del self.leases[request]
        self.finished += 1
        request = waiter.request
        del self.waiters[request]
        waiter.waits = False
        model.queue.leave(waiter)
        if waiter.priority != lease.priority:
            model.by_priority[lease.priority - 1] -= len(lease.slots)
            model.by_priority[waiter.priority - 1] += len(lease.slots)
        self.generation = generation = self.generation + 1
        next_lease = Lease(request, waiter.holder, replica, lease.slots, generation, waiter.priority, now, waits)
        next_lease.index = index = lease.index
        replica.leases[index] = self.leases[request] = next_lease
        return next_lease

    def release(self, lease: Lease, now: float) -> None:
        """Give all slots of a lease back, for whatever reason."""
        replica = lease.replica
        model = replica.model
        del self.leases[lease.request]
        replica.row = model.uses = None
        last = replica.leases.pop()
        if last is not lease:
            last.index = index = lease.index
            replica.leases[index] = last
        replica.free.extend(lease.slots)
        self.finished += 1
        slots = len(lease.slots)
        model.leased -= slots
        model.by_priority[lease.priority - 1] -= slots
        used = replica.slots - len(replica.free)
        if replica.state is READY:
            buckets = model.buckets
            del buckets[used + slots][replica]
            buckets[used][replica] = None
            model.free += slots
            if used < model.low:
                model.low = used
            if model.queue.count:
                self.touched[model] = None
            elif used == 0 and (self.pending_count or self.claims):
                self.went_idle[replica] = None
            if used == 0:
                replica.idle_since = now
                self.idle[replica] = None
                due = now + model.idle_timeout_s
                if due < model.armed_at:
                    self.touched[model] = None
        elif used == 0:
            self.touched[model] = None

    # --- replicas ----------------------------------------------------------------------------------------------

    def rest(self, replica: Replica, now: float) -> None:
        """The idle time of an idle replica begins now."""
        replica.idle_since = now
        self.idle.move_to_end(replica)
        replica.model.buckets[0].move_to_end(replica)

    @property
    def keeps_replicas(self) -> bool:
        """A replica stays when its engine ends."""
        return self.book.keeps_replicas

    def asleep_place(self, node: str, host_mib: int | None = None) -> Place:
        """What a replica without an engine takes of a node."""
        return Place(node, (), asleep_shape(self.asleep_mib if host_mib is None else host_mib))

    def place(self, model: Model, place: Place, now: float, for_engine: bool = True) -> Replica:
        """Make a record in STARTING on a place; it waits for a process to announce itself."""
        self.serial += 1
        replica = Replica(model, place, self.serial, now)
        replica.host_mib = self.asleep_mib
        model.replicas[replica] = None
        self.book.take(replica)
        if for_engine:
            self.set_placed(replica, True)
        self.move(replica, Cause.PLACED, now)
        return replica

    def set_placed(self, replica: Replica, placed: bool) -> None:
        """Its place is an engine's from now on, or is one no longer."""
        model = replica.model
        replica.is_placed = placed
        replica.row = None
        model.placed += 1 if placed else -1
        model.recount()
        if placed:
            model.quiet_from = -INFINITY
        if model.placed:
            self.resident[model] = None
        else:
            del self.resident[model]
            self.capacity_was = min(self.capacity_was, len(self.resident))

    def bind(self, replica: Replica, uid: str, started_at: float, now: float, reason: str = "") -> None:
        """A process announced itself for a record."""
        replica.uid = uid
        replica.started_at = started_at
        self.replicas[uid] = replica
        replica.model.sort_by_age()
        self.move(replica, Cause.ANNOUNCED, now, reason)

    def move(self, replica: Replica, cause: Cause, now: float, reason: str = "") -> None:
        """One transition of the table; an illegal one is a programmer's error and raises before anything changes.

        `reason` is told to those who watch.
        """
        before = replica.state
        after = TRANSITIONS[before, cause]
        if before >= DRAINING:
            took = now - replica.since
            if before is ReplicaState.STOPPING or (replica.is_placed and cause in (Cause.UNLOADED, Cause.SLEPT)):
                self.stop_s += 0.3 * (took - self.stop_s)
            elif before is DRAINING and cause in (Cause.EMPTIED, Cause.DISMISSED) and took > 0.0:
                longer = took > self.drain_s or not self.drained
                self.drain_s = took if longer else self.drain_s + 0.1 * (took - self.drain_s)
                self.drained = True
        model = replica.model
        if before is READY:
            model.unindex(replica)
            self.idle.pop(replica, None)
            self.went_idle.pop(replica, None)
        elif before is ReplicaState.ASLEEP:
            del self.asleep[replica]
            model.sleeping -= replica.engine_sleeps
            replica.engine_sleeps = False
            if cause is Cause.DISMISSED:
                # It has to be wanted before its process is started again.
                model.quiet_from = INFINITY
        if replica.told_to_stop and before is not STOPPING and after in (STOPPING, COLD):
            model.told_to_stop -= 1
        model.counts[before] -= before is not COLD
        model.counts[after] += after is not COLD
        replica.state = after
        model.recount()
        replica.since = now
        replica.row = model.uses = None
        if (before >= DRAINING) != (after >= DRAINING):
            self.book.note_going(replica)
        if after is READY:
            model.index_by_use(replica)
            if not replica.leases:
                replica.idle_since = now
                self.idle[replica] = None
                if self.pending_count or self.claims:
                    self.went_idle[replica] = None
        elif after is ReplicaState.ASLEEP:
            self._rest(replica, before, now)
        elif after is COLD:
            self._remove(replica)
        self.touched[model] = None
        self.changed[model] = None
        self.note(replica, before, cause.name.lower(), reason)

    def _rest(self, replica: Replica, before: ReplicaState, now: float) -> None:
        """A replica has nothing loaded from now on, unless it had not before: then it was used least recently."""
        self.asleep[replica] = None
        if replica.is_placed or before is ReplicaState.STARTING:
            replica.rested_at = now
        if not replica.is_placed:
            self.asleep.move_to_end(replica, last=False)

    def note(self, replica: Replica, before: ReplicaState, cause: str, reason: str = "") -> None:
        """Tell those who watch of a change that was made."""
        name, place = replica.model.name, replica.place
        moved = (name, replica.serial, replica.uid, place.node, place.devices, before, replica.state, cause, reason)
        self.transitions.append(Moved(*moved, _why(replica, before, reason)))

    def _remove(self, replica: Replica) -> None:
        model = replica.model
        del model.replicas[replica]
        model.quiet_from = max(model.quiet_from, self.now + QUIET_AGAIN_S)
        self.lacks_processes = True
        if replica.is_placed:
            self.set_placed(replica, False)
        if replica.uid is not None:
            del self.replicas[replica.uid]
            self.orphans.pop(replica.uid, None)
        self.leave_plans(replica)
        self.book.credit(replica)

    def leave_plans(self, replica: Replica) -> None:
        """What was counted on from it has come true, or never will."""
        if replica.claim is not None:
            replica.claim.victims.pop(replica, None)
            replica.claim = None
        if replica.model.order is not None:
            replica.model.order.batch.pop(replica, None)

    def quiesce(self, replica: Replica, now: float, reason: str = "") -> None:
        """Drain a READY replica: no new lease. The tree moves it on when it is empty."""
        self.move(replica, Cause.QUIESCED, now, reason)
        assert replica.uid is not None, "a READY replica has a process"
        self.out.append(Quiesce(replica.uid))

    def reopen(self, replica: Replica, now: float) -> None:
        """Open a draining replica again."""
        self.move(replica, Cause.REOPENED, now)
        assert replica.uid is not None, "a DRAINING replica has a process"
        self.out.append(Reopen(replica.uid))

    def revoke(self, replica: Replica, now: float) -> None:
        """End all leases of a replica that can serve them no more. Their holders notice by themselves."""
        for lease in list(replica.leases):
            self.release(lease, now)

    # --- what goes out -----------------------------------------------------------------------------------------

    def flush_desired(self) -> None:
        """Say every desired count that changed; the lowered first, since they make room."""
        if not self.changed:
            return
        rising = []
        for model in self.changed:
            desired = model.desired
            if desired > model.desired_sent:
                rising.append(model)
            elif desired < model.desired_sent or model.resend:
                self._say_desired(model)
        for model in rising:
            self._say_desired(model)
        self.changed.clear()

    def _say_desired(self, model: Model) -> None:
        model.desired_sent = model.desired
        model.resend = False
        self.out.append(SetDesired(model.name, model.desired))

    def best_pending(self, limit: int) -> list[Model]:
        """The models that wait for a place, best first, at most so many. Drops dead entries."""
        entries: list[tuple[float, int, Model]] = []
        found: dict[Model, None] = {}
        while self.pending and len(found) < limit:
            entry = heapq.heappop(self.pending)
            key, _, model = entry
            if model.pending_rank == key and model not in found:
                found[model] = None
                entries.append(entry)
        for entry in entries:
            heapq.heappush(self.pending, entry)
        return list(found)

    def watch_for_quiet(self, now: float) -> None:
        """Look in a moment whether nothing happens, and a process could be started for a model that has none."""
        if self.keeps_replicas and self.lacks_processes and self.holders and not self.is_recovering:
            self.quiet_at = now + QUIET_S
            self.quiet_seen = self.submitted
            self.wake = min(self.wake, self.quiet_at)

    # --- timers ------------------------------------------------------------------------------------------------

    def arm(self, model: Model, due: float) -> None:
        """Look at a model again at `due`, unless an earlier look is already on."""
        if due < model.armed_at:
            model.armed_at = due
            if due < self.wake:
                self.wake = due
            self.serial += 1
            heapq.heappush(self.timers, (due, self.serial, model))

    def next_timer(self) -> tuple[float, int, Model] | None:
        """The next live timer. Drops dead ones."""
        while self.timers:
            due, _, model = self.timers[0]
            if due == model.armed_at:
                return self.timers[0]
            heapq.heappop(self.timers)
        return None


def _single(slot: int) -> tuple[int, ...]:
    """A lease of one slot: nearly all are, so one object stands for all that have the same slot."""
    return _SINGLES[slot] if slot < len(_SINGLES) else (slot,)


def _why(replica: Replica, before: ReplicaState, reason: str) -> Because | None:
    """Why a replica changes its state; None where it, or its process, did so by itself."""
    if replica.claim is not None:
        return replica.claim.because
    if before is COLD:
        model, head = replica.model, replica.model.queue.head()
        if model.order is not None:
            return Because("operator")
        return Because("kept") if head is None else Because("demand", head.request)
    return Because(reason) if reason else None
