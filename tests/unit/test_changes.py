"""The change log and those who follow it, over a ledger of their own."""

from __future__ import annotations

import asyncio

import pytest

from cluster import changes
from cluster.changes import ChangeLog, Changes, Watch
from cluster.ledger.events import (
    ConfigChanged,
    LeaseReleased,
    ReplicaReady,
    ReplicaStarted,
    RequestArrived,
    ServerManifest,
)
from cluster.ledger.ledger import Ledger
from cluster.ledger.specs import ModelSpec, NodeSpec, PoolSpec, ServerSpec
from cluster.metrics import Counts, Outcome

SPEC = PoolSpec(
    models={name: ModelSpec(name, slots=2, num_gpus=1.0) for name in "ab"}, nodes={"n": NodeSpec("n", gpus=1)}
)


class Room:
    """A ledger, who watches it, and one follower."""

    def __init__(self, limit: int = 100, spec: PoolSpec = SPEC, epoch: str = "e") -> None:
        self.ledger = Ledger(spec, epoch=epoch, now=0.0)
        self.counts = Counts(self.ledger.knows)
        self.log = ChangeLog(epoch, limit)
        self.watch = Watch(self.ledger, self.counts, self.log)
        self.now = 0.0
        self.seen = ("", 0)

    def tell(self, *events: object) -> None:
        for event in events:
            self.ledger.decide(event, self.now)  # type: ignore[arg-type]
            self.watch.decided(event)

    def load(self, model: str = "a", replica: str = "u") -> None:
        self.tell(RequestArrived("r", "h", model, 2, 9e9), ReplicaStarted(model, replica, "n"), ReplicaReady(replica))

    async def follow(self, timeout_s: float = 5.0, limit: int = 1000) -> Changes:
        found = await self.watch.follow(*self.seen, timeout_s, limit, self.ledger.snapshot)
        self.seen = (found.epoch, found.version)
        return found


async def test_a_follower_begins_with_a_snapshot_and_goes_on_from_there():
    room = Room()
    room.load()
    first = await room.follow()
    assert first.snapshot is not None
    assert (first.snapshot.models["a"].leases, first.changes) == (1, [])
    room.tell(RequestArrived("s", "h", "b", 1, 9e9))
    more = await room.follow()
    assert more.snapshot is None
    assert [change.version for change in more.changes] == list(range(first.version + 1, more.version + 1))
    assert {change.kind for change in more.changes} >= {"queue"}


async def test_a_follower_parks_until_something_happens():
    room = Room()
    await room.follow()
    parked = asyncio.create_task(room.follow())
    await asyncio.sleep(0)
    assert not parked.done()
    room.load()
    found = await parked
    assert found.changes[0].kind == "replica"
    assert found.changes[0].data["to"] == "STARTING"


async def test_who_waits_in_vain_is_told_nothing():
    room = Room()
    before = await room.follow()
    after = await room.follow(timeout_s=0.01)
    assert (after.version, after.snapshot, after.changes) == (before.version, None, [])


async def test_who_fell_behind_or_lived_in_another_life_begins_anew():
    room = Room(limit=5)
    room.load()
    assert room.log.version > 5
    room.seen = ("e", 0)
    assert (await room.follow()).snapshot is not None
    room.seen = ("former life", room.log.version)
    assert (await room.follow()).snapshot is not None
    room.seen = ("e", room.log.version + 1)
    assert (await room.follow()).snapshot is not None


async def test_a_long_absence_comes_in_batches_without_a_gap():
    room = Room()
    await room.follow()
    room.load()
    last, versions = room.log.version, []
    while not versions or versions[-1] < last:
        versions += [change.version for change in (await room.follow(limit=2)).changes]
    assert versions == list(range(versions[0], last + 1))


async def test_counts_are_told_once_in_a_while_and_only_to_those_who_follow():
    room = Room()
    room.load()
    room.tell(LeaseReleased("r", 1))
    written = room.log.version
    for index in range(50):
        room.tell(RequestArrived(f"x{index}", "h", "a", 2, 9e9), LeaseReleased(f"x{index}", index + 2))
    assert room.log.version == written, "nobody follows"
    await room.follow()
    parked = asyncio.create_task(room.follow())
    await asyncio.sleep(0)
    for index in range(50):
        room.tell(RequestArrived(f"y{index}", "h", "a", 2, 9e9))
    found = await parked
    kinds = [(change.kind, change.data.get("leases"), change.data.get("queued")) for change in found.changes]
    assert kinds == [("lease", 2, None), ("queue", None, 48)]


async def test_what_a_follower_is_told_adds_up_to_the_ledger():
    """Models, leases and queues as they stand at the end, from nothing but a first snapshot and the entries."""
    room = Room()
    await room.follow()
    room.load()
    room.tell(RequestArrived("s", "h", "b", 1, 9e9), LeaseReleased("r", 1))
    room.tell(RequestArrived("t", "h", "b", 3, 9e9))
    room.watch.review()
    stands = {name: {"state": "unloaded", "leases": 0, "queued": 0} for name in "ab"}
    for change in (await room.follow()).changes:
        if change.kind in ("model", "lease", "queue"):
            assert change.model is not None
            told = {key: value for key, value in change.data.items() if key in ("state", "leases", "queued")}
            stands[change.model] |= told
    rows = room.ledger.snapshot().models
    assert stands == {n: {"state": r.state, "leases": r.leases, "queued": r.queued} for n, r in rows.items()}


async def test_swaps_progress_servers_and_the_configuration_are_told():
    spec = PoolSpec(models=SPEC.models, nodes=SPEC.nodes, servers=(ServerSpec("http://one"),))
    room = Room(spec=spec)
    room.load()
    room.watch.progress("u", 0.51239)
    room.tell(LeaseReleased("r", 1), RequestArrived("s", "h", "b", 1, 9e9))
    room.tell(ServerManifest("http://one", ("m",)))
    room.tell(ConfigChanged(SPEC))
    room.tell(RequestArrived("t", "h", "b", 1, 9e9))
    told = room.log.after("e", 0)
    assert told is not None
    by_kind = {change.kind: change for change in told}
    assert (by_kind["load"].model, by_kind["load"].replica, by_kind["load"].data) == ("a", "u", {"progress": 0.512})
    because = {"rule": "idle", "waiter": "s", "bound_in_s": 15.0, "cost_s": 0, "victims": ["u"]}
    assert by_kind["swap"].data == {"victims": ["u"], "reason": "idle", "because": because}
    drained = [
        change.data["because"] for change in told if change.kind == "replica" and change.data["to"] == "DRAINING"
    ]
    assert drained == [because]
    assert "config" in by_kind
    servers = [change.data for change in told if change.kind == "server"]
    assert [each.get("available_models") for each in servers][-2:] == [["m"], None]
    assert servers[-1] == {"url": "http://one", "removed": True}
    gone = [change.model for change in told if change.kind == "model" and change.data["removed"]]
    assert gone == ["m"]


async def test_a_reason_names_the_request_as_its_client_does():
    room = Room()
    room.watch = Watch(room.ledger, room.counts, room.log, trace_of=lambda request: f"client's {request}" * 30)
    room.load()
    room.tell(LeaseReleased("r", 1), RequestArrived("s", "h", "b", 1, 9e9))
    told = room.log.after("e", 0)
    assert told is not None
    swap = next(change for change in told if change.kind == "swap")
    assert swap.data["because"]["request"] == ("client's s" * 30)[:128]


async def test_leases_and_queues_are_told_with_what_people_want_to_know():
    room = Room()
    await room.follow()
    room.load()
    room.now = 3.0
    room.tell(RequestArrived("s", "h", "b", 1, 9e9))
    room.watch.review()
    told = (await room.follow()).changes
    leases = [change.data for change in told if change.kind == "lease"]
    assert leases[-1] == {
        "leases": 1,
        "drain_s": None,
        "replicas": [{"record": 2, "leases": 1, "used": 1, "slots": 2}],
    }
    (queue,) = [change.data for change in told if change.kind == "queue" and change.model == "b"]
    assert queue == {"queued": 1, "by_class": [1, 0, 0], "since_by_class": [3.0, None, None], "bound_at": 18.0}
    (loaded,) = [change.data for change in told if change.kind == "model" and change.data["state"] == "loaded"]
    assert (loaded["pinned"], loaded["remote"], loaded["removed"]) == (False, False, False)


OUTCOME = Outcome("a", "chat", "alice", 2, 200, 0.5, 0.25, 1.0, 2.0, 7, 3, 20, "mine")


async def test_a_request_that_ended_is_told_without_what_it_said():
    room = Room()
    await room.follow()
    room.watch.ended("r", OUTCOME._replace(trace="x" * 1000))
    (told,) = (await room.follow()).changes
    assert (told.kind, told.model, told.replica) == ("request", "a", None)
    assert told.data == {
        "id": "r",
        "family": "chat",
        "principal": "alice",
        "priority": 2,
        "status": 200,
        "queue_wait_s": 0.5,
        "load_wait_s": 0.25,
        "ttft_s": 1.0,
        "total_s": 2.0,
        "prompt_tokens": 7,
        "cached_tokens": 3,
        "restored_tokens": None,
        "output_tokens": 20,
        "trace": "x" * 128,
    }


async def test_a_flood_of_requests_is_summed_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(changes, "REQUESTS_PERIOD_S", 0.01)
    room = Room()
    await room.follow()
    for _ in range(2):
        before = room.log.version
        for index in range(1000):
            room.watch.ended(f"r{index}", OUTCOME)
        await asyncio.sleep(0.05)
        told = room.log.after("e", before)
        assert told is not None
        assert [change.kind for change in told] == ["request"] * 10 + ["requests"]
        assert told[-1].data == {"count": 990, "prompt_tokens": 990 * 7, "output_tokens": 990 * 20}


async def test_who_begins_is_shown_what_happened_before():
    room = Room()
    room.load()
    room.watch.ended("r", OUTCOME)
    room.watch.progress("u", 0.5)
    recent = (await room.follow()).recent
    assert [change.kind for change in recent][-1] == "request"
    assert {change.kind for change in recent} == {"replica", "request"}
    assert [change.version for change in recent] == sorted(change.version for change in recent)


@pytest.mark.parametrize("limit", [1, 3, 100])
def test_a_log_keeps_the_newest(limit: int):
    log = ChangeLog("e", limit)
    for index in range(10):
        log.add("model", "a", ready=index)
    kept = log.after("e", max(0, 10 - limit))
    assert kept is not None
    assert [change.data["ready"] for change in kept] == list(range(max(0, 10 - limit), 10))
    assert log.after("e", 10) == []
