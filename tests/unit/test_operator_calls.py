"""Operators' calls, on a real ledger without Ray: each ends with the event that decides it, and with the right word."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cluster.ledger.events import (
    ConfigChanged,
    LoadRefused,
    LoadRequested,
    ReplicaFailed,
    ReplicaGone,
    ReplicaReady,
    ReplicaStarted,
    Ticked,
    UnloadRequested,
)
from cluster.ledger.ledger import Ledger
from cluster.ledger.specs import ModelSpec, NodeSpec, PoolSpec
from cluster.operator_calls import Done, OperatorCalls, refuse_unload


class Desk:
    """A ledger and its operators' calls; `post` does what the actor does."""

    def __init__(self) -> None:
        models = {"a": ModelSpec("a", num_gpus=1.0, max_replicas=2, load_timeout_s=20.0)}
        self.ledger = Ledger(PoolSpec(models=models, nodes={"n": NodeSpec("n", gpus=2)}), epoch="e", now=0.0)
        self.calls = OperatorCalls(self.ledger)
        self.now = 0.0

    def post(self, event: Any, now: float | None = None) -> None:
        self.now = now if now is not None else self.now + 0.1
        self.calls.review(self.ledger.decide(event, self.now))
        self.ledger.check()

    async def begin(self, replicas: int) -> asyncio.Task[Any]:
        self.post(LoadRequested("a", replicas) if replicas else UnloadRequested("a"))
        call = asyncio.create_task(self.calls.until("a", replicas))
        await asyncio.sleep(0)
        return call


@pytest.fixture
def desk() -> Desk:
    return Desk()


async def ended(call: asyncio.Task[Any]) -> Any:
    return await asyncio.wait_for(call, 1)


async def test_a_load_ends_when_all_replicas_are_ready(desk: Desk):
    call = await desk.begin(2)
    for uid in ("u", "v"):
        desk.post(ReplicaStarted("a", uid, "n"))
        assert not call.done()
        desk.post(ReplicaReady(uid))
    assert await ended(call) == Done("a", 2)
    assert await ended(await desk.begin(1)) == Done("a", 2)


async def test_a_failed_load_is_told_when_nothing_is_left_of_it(desk: Desk):
    call = await desk.begin(1)
    desk.post(ReplicaStarted("a", "u", "n"))
    desk.post(ReplicaFailed("u", "no such file"))
    await asyncio.sleep(0)
    assert not call.done()
    desk.post(ReplicaGone("u"))
    refused = await ended(call)
    assert isinstance(refused, LoadRefused)
    assert refused.extras == {"code": "model_load_failed", "status": 500}
    assert "no such file" in refused.message
    again = await desk.begin(1)
    desk.post(ReplicaStarted("a", "v", "n"))
    desk.post(ReplicaReady("v"))
    assert await ended(again) == Done("a", 1)


async def test_an_order_without_room_ends_at_its_deadline(desk: Desk):
    """A pinned model has both devices and never leaves."""
    models = {"a": ModelSpec("a", num_gpus=2.0, load_timeout_s=5.0), "b": ModelSpec("b", num_gpus=2.0, pinned=True)}
    desk.post(ConfigChanged(PoolSpec(models=models)))
    desk.post(LoadRequested("b", 1))
    desk.post(ReplicaStarted("b", "u", "n"))
    desk.post(ReplicaReady("u"))
    call = await desk.begin(1)
    while not call.done() and (due := desk.ledger.next_deadline()) is not None:
        desk.post(Ticked(), due)
        await asyncio.sleep(0)
    refused = await ended(call)
    assert (refused.error, refused.extras) == ("BackendTimeout", {"phase": "queued"})
    assert 5.0 < desk.now < 6.0


async def test_an_unload_takes_back_a_load_and_waits_for_the_last_process(desk: Desk):
    call = await desk.begin(1)
    desk.post(ReplicaStarted("a", "u", "n"))
    unload = await desk.begin(0)
    assert (await ended(call)).extras == {"code": "model_unloading", "status": 409}
    assert not unload.done()
    desk.post(ReplicaGone("u"))
    assert await ended(unload) == Done("a", 0)
    assert await ended(await desk.begin(0)) == Done("a", 0)


async def test_a_model_that_is_removed_ends_its_load(desk: Desk):
    call = await desk.begin(1)
    desk.post(ConfigChanged(PoolSpec()))
    assert (await ended(call)).error == "ModelNotFound"


async def test_an_operator_who_hangs_up_leaves_nothing_behind(desk: Desk):
    call = await desk.begin(1)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    desk.post(ReplicaStarted("a", "u", "n"))
    desk.post(ReplicaReady("u"))
    assert desk.ledger.snapshot().models["a"].state == "loaded"


def test_what_loads_is_not_unloaded(desk: Desk):
    assert refuse_unload("a", desk.ledger.model("a")) is None
    desk.post(LoadRequested("a", 1))
    assert refuse_unload("a", desk.ledger.model("a")).extras["code"] == "model_loading"
    assert refuse_unload("x", None).error == "ModelNotFound"
