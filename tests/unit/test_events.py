"""The stream of events, over a change log of its own."""

from __future__ import annotations

import contextlib
import json
from types import SimpleNamespace
from typing import Any

import pytest

from app.routes import llama_router
from app.routes.events import seen_by, stream
from cluster import errors
from cluster.changes import ChangeLog, Changes, Watch
from cluster.ledger.events import ReplicaStarted, RequestArrived
from cluster.ledger.ledger import Ledger
from cluster.ledger.specs import ModelSpec, NodeSpec, PoolSpec
from cluster.metrics import Counts

SPEC = PoolSpec(models={"a": ModelSpec("a", num_gpus=1.0)}, nodes={"n": NodeSpec("n", gpus=1)})


class Pool:
    """A ledger with its change log, as a client of the ledger shows them."""

    def __init__(self, epoch: str = "e-1") -> None:
        self.begin(epoch)
        self.is_down = False

    def begin(self, epoch: str) -> None:
        """A new life of the ledger."""
        self.ledger = Ledger(SPEC, epoch=epoch, now=0.0)
        self.watch = Watch(self.ledger, Counts(self.ledger.knows), ChangeLog(epoch, limit=20))

    def tell(self, *posted: Any) -> None:
        for event in posted:
            self.ledger.decide(event, 0.0)
            self.watch.decided(event)

    async def changes(self, epoch: str, version: int, timeout_s: float) -> Changes:
        if self.is_down:
            self.is_down = False
            raise errors.BackendUnavailable("gone")
        return await self.watch.follow(epoch, version, 0.01, 1000, self.ledger.snapshot)


async def read(pool: Pool, seen: str, count: int) -> list[SimpleNamespace]:
    """So many parts of the stream behind `seen`, comments among them."""
    found: list[SimpleNamespace] = []
    async with contextlib.aclosing(stream(pool, seen)) as chunks:  # type: ignore[arg-type]
        async for chunk in chunks:
            for part in chunk.decode().strip().split("\n\n"):
                if part.startswith(":"):
                    found.append(SimpleNamespace(id=None, event="comment", data=None))
                    continue
                fields = dict(line.split(": ", 1) for line in part.split("\n"))
                data = json.loads(fields["data"])
                found.append(SimpleNamespace(id=fields.get("id"), event=fields["event"], data=data))
            if len(found) >= count:
                return found
    raise AssertionError("the stream has ended")


async def test_a_stream_begins_with_a_snapshot_and_goes_on_exactly_behind_any_event():
    pool = Pool()
    (first,) = await read(pool, "", 1)
    assert (first.event, first.data["epoch"], set(first.data["models"])) == ("snapshot", "e-1", {"a"})
    pool.tell(RequestArrived("r", "h", "a", 2, 9e9), ReplicaStarted("a", "u", "n"))
    events = await read(pool, first.id, 2)
    versions = [int(each.id.rpartition("-")[2]) for each in events]
    assert versions == list(range(versions[0], versions[0] + len(events)))
    assert versions[0] == int(first.id.rpartition("-")[2]) + 1
    assert (events[0].event, events[0].data["data"]["to"]) == ("replica", "STARTING")
    for index, event in enumerate(events[:-1]):
        assert [each.id for each in await read(pool, event.id, 1)] == [each.id for each in events[index + 1 :]]
    assert [each.event for each in await read(pool, events[-1].id, 1)] == ["comment"]


async def test_a_snapshot_brings_what_happened_before_it():
    pool = Pool()
    pool.tell(RequestArrived("r", "h", "a", 2, 9e9))
    (first,) = await read(pool, "", 1)
    (placed,) = first.data["recent"]
    assert (placed["kind"], placed["data"]["cause"], placed["why"]) == ("replica", "placed", "request r waits for it")
    assert placed["text"] == "A process for a starts on device 0, because request r waits for it."


async def test_who_was_away_too_long_or_in_another_life_begins_anew():
    pool = Pool()
    (first,) = await read(pool, "", 1)
    for index in range(40):
        pool.watch.progress("u", index / 40)
    reset, snapshot = await read(pool, first.id, 2)
    assert (reset.event, reset.id, reset.data, snapshot.event) == ("reset", None, {"reason": "too_old"}, "snapshot")
    pool.begin("e-2")
    reset, snapshot = await read(pool, snapshot.id, 2)
    assert (reset.data, snapshot.data["epoch"]) == ({"reason": "epoch"}, "e-2")


async def test_a_ledger_that_is_restarted_ends_no_stream():
    pool = Pool()
    pool.is_down = True
    assert [each.event for each in await read(pool, "", 2)] == ["comment", "snapshot"]


@pytest.mark.parametrize(
    ("event_id", "seen"),
    [
        ("e-5", ("e", 5)),
        ("e-x-12", ("e-x", 12)),
        ("", ("", 0)),
        ("-5", ("", 0)),
        ("e-", ("", 0)),
        ("e--1", ("e-", 1)),
        ("e-²", ("", 0)),
        ("e-" + "9" * 5000, ("", 0)),
    ],
)
def test_what_an_id_names(event_id: str, seen: tuple[str, int]):
    assert seen_by(event_id) == seen


async def test_the_same_in_llama_servers_words():
    """What it follows is the pool's one log; a client that may see one model only is told of no other."""
    pool = Pool()
    seen: list[Any] = []
    shown = {"a"}
    async with contextlib.aclosing(llama_router.stream(pool, shown.__contains__)) as chunks:  # type: ignore[arg-type]
        async for chunk in chunks:
            seen += [json.loads(part[6:]) for part in chunk.decode().split("\n\n") if part.startswith("data: ")]
            if len(seen) >= 3:
                break
            if not seen:
                pool.watch.log.add("load", "b", "b#1", progress=0.2)
                pool.watch.log.add("model", "a", state="loading", ready=0, last_error=None, removed=False)
                pool.watch.log.add("load", "a", "a#1", progress=0.5)
                pool.watch.log.add("model", "a", state="failed", ready=0, last_error="x", removed=False)
    loading, half, failed = seen
    assert loading == {"model": "a", "event": "model_status", "data": {"status": "loading"}}
    assert half["data"]["progress"]["value"] == 0.5
    assert failed["data"] == {"status": "unloaded", "failed": True, "exit_code": 1}
