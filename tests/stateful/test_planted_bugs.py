"""Proof that the state machine would notice if the ledger were wrong.

Each of these is a mistake that a real scheduler has made, as a patch of one function, and must be caught within 1,600
examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import Phase

from cluster.ledger import ledger as front
from cluster.ledger import placing, states, tree
from cluster.ledger.books import engine_moves, pool, queue, records, stops
from cluster.ledger.books.placement import Book, Node
from cluster.ledger.books.shapes import Place, Shape
from cluster.ledger.events import (
    EngineDied,
    HolderAnnounced,
    HolderDied,
    LeaseReleased,
    ReplicaReady,
    ReplicaStarted,
    RequestArrived,
)
from cluster.ledger.handlers import engines, holders, replicas, requests, starts
from cluster.ledger.rules import sleepers
from cluster.ledger.states import Cause, ReplicaState
from tests.stateful.budget import run_machine


def stale_releases_count(patch: pytest.MonkeyPatch) -> None:
    """A slot can be given back twice, or by somebody with an old lease."""
    right = requests.lease_released

    def wrong(books: pool.Pool, event: LeaseReleased, now: float) -> None:
        lease = books.leases.get(event.request)
        right(books, event if lease is None else event._replace(generation=lease.generation), now)

    patch.setitem(front._HANDLERS, LeaseReleased, wrong)


def memory_is_credited_early(patch: pytest.MonkeyPatch) -> None:
    """The next model is loaded while the previous one's memory is not yet free."""
    right = pool.Pool.move

    def wrong(books: pool.Pool, replica: records.Replica, cause: Cause, now: float, reason: str = "") -> None:
        right(books, replica, cause, now, reason)
        if cause in (Cause.EMPTIED, Cause.DISMISSED):
            right(books, replica, Cause.GONE, now)

    patch.setattr(pool.Pool, "move", wrong)


def draining_replicas_get_requests(patch: pytest.MonkeyPatch) -> None:
    """A victim is chosen, but newcomers still get in: it never runs dry."""
    right = requests.request_arrived

    def wrong(books: pool.Pool, event: RequestArrived, now: float) -> None:
        right(books, event, now)
        waiter = books.waiters.get(event.request)
        if waiter is None:
            return
        for replica in waiter.model.in_state(ReplicaState.DRAINING):
            if replica.free:
                books.dequeue(waiter)
                waiter.model.leased += 1
                waiter.model.by_priority[waiter.priority - 1] += 1
                books.generation += 1
                lease = records.Lease(
                    event.request,
                    event.holder,
                    replica,
                    (replica.free.pop(),),
                    books.generation,
                    event.priority,
                    now,
                    (0, 0),
                )
                lease.index = len(replica.leases)
                replica.leases.append(lease)
                books.leases[event.request] = lease
                books.announce(lease)
                return

    patch.setitem(front._HANDLERS, RequestArrived, wrong)


def eviction_does_not_wait(patch: pytest.MonkeyPatch) -> None:
    """The victim is stopped at once, and its streams with it."""
    right = pool.Pool.quiesce

    def wrong(books: pool.Pool, replica: records.Replica, now: float, reason: str = "") -> None:
        right(books, replica, now, reason)
        books.revoke(replica, now)

    patch.setattr(pool.Pool, "quiesce", wrong)


def last_come_first_served(patch: pytest.MonkeyPatch) -> None:
    """The queue is a stack."""

    def wrong(self: queue.WaitQueue) -> records.Waiter | None:
        line = list(self)
        return line[-1] if line else None

    patch.setattr(queue.WaitQueue, "head", wrong)


def holders_leases_leak(patch: pytest.MonkeyPatch) -> None:
    """A dead ingress keeps its slots, and pins the memory under them for ever."""

    def wrong(books: pool.Pool, event: HolderDied, now: float) -> None:
        books.dead_holders.add(event.holder, now)
        for waiter in [each for each in books.waiters.values() if each.holder == event.holder]:
            books.dequeue(waiter)
            books.finished += 1
            books.touched[waiter.model] = None

    patch.setitem(front._HANDLERS, HolderDied, wrong)


def deadlines_are_forgotten(patch: pytest.MonkeyPatch) -> None:
    """Who waits, waits for ever."""
    patch.setattr(pool.Pool, "next_deadline", lambda self: (queue.INFINITY, None))


def pinned_models_are_victims(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(records.Model, "is_pinned", property(lambda self: False))


def devices_are_overcommitted(patch: pytest.MonkeyPatch) -> None:
    """A model is placed where there is no room for it."""

    def wrong(self: Node, shape: Shape, hosts: Any, booked: Any = None) -> Place | None:
        return Place(self.name, tuple(range(min(shape.devices, len(self.gpu)))), shape)

    patch.setattr(Node, "fit", wrong)


def loaded_for_nobody(patch: pytest.MonkeyPatch) -> None:
    """A model that has just been loaded leaves again before its waiter holds a slot."""
    right = replicas.replica_ready

    def wrong(books: pool.Pool, event: ReplicaReady, now: float) -> None:
        right(books, event, now)
        replica = books.replicas.get(event.replica)
        if replica is not None and replica.state is ReplicaState.READY and books.pending_count:
            books.quiesce(replica, now)

    patch.setitem(front._HANDLERS, ReplicaReady, wrong)


def waiters_are_lost_on_a_failed_load(patch: pytest.MonkeyPatch) -> None:
    """After a failed load its waiters are dropped without an answer."""
    right = requests.refuse_or_reroute

    def wrong(books: pool.Pool, waiter: records.Waiter, now: float, error: Any) -> None:
        right(books, waiter, now, error)
        if books.out:
            books.out.pop()

    patch.setattr(engines, "refuse_or_reroute", wrong)


def desired_rises_too_soon(patch: pytest.MonkeyPatch) -> None:
    """A model is wanted again while its last process has not gone: Serve never stops the old one."""
    patch.setattr(records.Model, "leaving", property(lambda self: 0))


def stopping_victims_are_revived(patch: pytest.MonkeyPatch) -> None:
    """A victim is taken back when Serve may be killing it already."""
    right = requests.request_arrived
    patch.setitem(states.TRANSITIONS, (ReplicaState.STOPPING, Cause.REOPENED), ReplicaState.READY)

    def wrong(books: pool.Pool, event: RequestArrived, now: float) -> None:
        right(books, event, now)
        waiter = books.waiters.get(event.request)
        stopping = list(waiter.model.in_state(ReplicaState.STOPPING)) if waiter is not None else []
        if stopping:
            books.reopen(stopping[0], now)

    patch.setitem(front._HANDLERS, RequestArrived, wrong)


def one_of_two_never_loads(patch: pytest.MonkeyPatch) -> None:
    """A waiting model for which there was no room at first is not looked at again."""

    def wrong(books: pool.Pool, model: records.Model, now: float, bound: bool, looked: int) -> None:
        model.look_at = queue.INFINITY

    patch.setattr(placing, "_look_later", wrong)
    patch.setattr(pool.Pool, "best_pending", lambda self, limit: [])


def wide_leases_give_one_slot_back(patch: pytest.MonkeyPatch) -> None:
    right = pool.Pool.release

    def wrong(books: pool.Pool, lease: records.Lease, now: float) -> None:
        lease.slots = lease.slots[:1]
        right(books, lease, now)

    patch.setattr(pool.Pool, "release", wrong)


def dead_engines_keep_their_leases(patch: pytest.MonkeyPatch) -> None:
    right = engines.engine_died

    def wrong(books: pool.Pool, event: EngineDied, now: float) -> None:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(pool.Pool, "revoke", lambda *_: None)
            right(books, event, now)

    patch.setitem(front._HANDLERS, EngineDied, wrong)


def grants_under_way_are_reconciled_away(patch: pytest.MonkeyPatch) -> None:
    """A holder that has not received its grant yet is taken for one that has given it back."""
    right = holders.holder_announced

    def wrong(books: pool.Pool, event: HolderAnnounced, now: float) -> None:
        waiting = tuple(each for each in event.waiting if each not in books.leases)
        right(books, event._replace(waiting=waiting), now)

    patch.setitem(front._HANDLERS, HolderAnnounced, wrong)


def serve_stops_whom_we_like(patch: pytest.MonkeyPatch) -> None:
    """A count falls as soon as some replica has drained, though Serve would stop another one of its model."""

    def wrong(book: Book, model: records.Model, more: Iterable[records.Replica] = ()) -> list[records.Replica]:
        # Where replicas stay, an engine that has drained is not Serve's business.
        there = [] if book.keeps_replicas else model.replicas
        leaving = [each for each in there if ReplicaState.DRAINING <= each.state < ReplicaState.STOPPING]
        return [*more, *(each for each in leaving if not each.leases)]

    patch.setattr(tree, "stops", SimpleNamespace(**{**vars(stops), "certain": wrong}))


def slots_of_a_former_life_are_forgotten(patch: pytest.MonkeyPatch) -> None:
    """After a restart a replica is taken to run what the configuration says now, whatever it was loaded for."""
    right = replicas.replica_ready

    def wrong(books: pool.Pool, event: ReplicaReady, now: float) -> None:
        right(books, event._replace(slots=0, revision=None), now)

    patch.setitem(front._HANDLERS, ReplicaReady, wrong)


def ages_of_a_former_life_are_forgotten(patch: pytest.MonkeyPatch) -> None:
    """After a restart the replicas of a model are taken to be as old as their announcements."""
    right = replicas.replica_started

    def wrong(books: pool.Pool, event: ReplicaStarted, now: float) -> None:
        books.serial += 1
        right(books, event._replace(started_at=float(books.serial)), now)

    patch.setitem(front._HANDLERS, ReplicaStarted, wrong)


def lines_are_too_long_in_the_recovery_window(patch: pytest.MonkeyPatch) -> None:
    """Who is refused for the length of a line, while nobody knows yet how many slots are free."""
    right = requests.request_arrived

    def wrong(books: pool.Pool, event: RequestArrived, now: float) -> None:
        model = books.models.get(event.model)
        limit = None if model is None else model.spec.max_queued
        if books.is_recovering and model is not None and limit is not None and model.queue.count >= limit:
            books.submitted += 1
            books.reject(event.request, event.holder, "QueueFull", "too many requests wait")
        else:
            right(books, event, now)

    patch.setitem(front._HANDLERS, RequestArrived, wrong)


def a_start_is_planned_once(patch: pytest.MonkeyPatch) -> None:
    """Ray starts one process where another was planned, which keeps its place there and can never start."""
    patch.setattr(starts, "replan", lambda *_, **__: None)


def the_newest_stops_on_any_node(patch: pytest.MonkeyPatch) -> None:
    """Serve is taken to stop the newest replica, as it does on one node only."""
    patch.setattr(stops, "may_go_before", lambda book, other, replica: other.age > replica.age)


def sleepers_wake_anywhere(patch: pytest.MonkeyPatch) -> None:
    """An engine that sleeps is woken on whichever devices are free."""
    patch.setattr(Node, "fit_awake", lambda self, sleeper, shape, hosts: self.fit(shape, hosts))

    def wrong(model: records.Model, place: Place) -> records.Replica | None:
        return next((each for each in model.replicas if each.engine_sleeps), None)

    patch.setattr(sleepers, "sleeper_at", wrong)


def what_sleepers_hold_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    """What an engine that sleeps still holds of its devices is given to others."""
    right = engine_moves.lay_down

    def wrong(books: pool.Pool, replica: records.Replica, host: int, held: int, devices: tuple[int, ...]) -> None:
        right(books, replica, host, 0, devices)

    patch.setattr(engine_moves, "lay_down", wrong)


BUGS = [
    stale_releases_count,
    memory_is_credited_early,
    draining_replicas_get_requests,
    eviction_does_not_wait,
    last_come_first_served,
    holders_leases_leak,
    deadlines_are_forgotten,
    pinned_models_are_victims,
    devices_are_overcommitted,
    loaded_for_nobody,
    waiters_are_lost_on_a_failed_load,
    desired_rises_too_soon,
    stopping_victims_are_revived,
    one_of_two_never_loads,
    wide_leases_give_one_slot_back,
    dead_engines_keep_their_leases,
    grants_under_way_are_reconciled_away,
    serve_stops_whom_we_like,
    sleepers_wake_anywhere,
    what_sleepers_hold_is_forgotten,
    slots_of_a_former_life_are_forgotten,
    ages_of_a_former_life_are_forgotten,
    lines_are_too_long_in_the_recovery_window,
    a_start_is_planned_once,
    the_newest_stops_on_any_node,
]


@pytest.mark.parametrize("plant", BUGS, ids=lambda plant: plant.__name__)
@pytest.mark.timeout(300)
def test_a_planted_bug_is_caught(plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    with pytest.raises((AssertionError, KeyError)):
        for seed in range(1, 5):
            run_machine(seed=seed, examples=400, phases=[Phase.generate], report_multiple_bugs=False)
