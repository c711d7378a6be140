"""Processes die without a word; what they held is lost, everything else goes on, and the books balance again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.pool import Pool, fake, loaded, running_pool

MODELS = {
    "calm": {**fake(tokens_per_s=20, tokens=100), "target_inflight": 8, "min_replicas": 1},
    "to_drain": {**fake(tokens_per_s=20, tokens=100), "target_inflight": 8, "min_replicas": 1},
    "ordered": fake(load_s=2, tokens=5),
    "late": {**fake(tokens=5), "num_gpus": 1},
    "rival": {**fake(tokens=5), "num_gpus": 1},
}


@pytest.fixture(scope="module")
def pool(port: int) -> Iterator[Pool]:
    with running_pool(port, {"models": MODELS}) as pool:
        yield pool
        pool.check()


def words(model: str, count: int) -> str:
    return "".join(f"{model}:{index} " for index in range(count))


async def read(pool: Pool, model: str, started: asyncio.Event, tokens: int = 100) -> str:
    """The text of one stream, with the message of its error event at the end if there is one."""
    text = ""
    async with pool.async_openai() as client:
        try:
            stream = await client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": "x"}], max_tokens=tokens, stream=True
            )
            async for chunk in stream:
                text += chunk.choices[0].delta.content or ""
                started.set()
        except openai.APIError as error:
            text += f"<{error.message}>"
    return text


def process_of(actor: Any) -> int:
    """The process in which an actor runs."""
    import ray

    def pid_of(_: Any) -> int:
        import os

        return os.getpid()

    return int(ray.get(actor.__ray_call__.remote(pid_of)))


def replica_of(snapshot: dict[str, Any], model: str) -> dict[str, Any]:
    return loaded(snapshot, model)[0]


def kill_replica(model: str, unique_id: str) -> None:
    """The replica's process ends at once, as by kill -9."""
    import ray

    actor = ray.get_actor(f"SERVE_REPLICA::slotpool#{model}#{unique_id}", namespace="serve")
    ray.kill(actor, no_restart=True)


async def test_a_replica_killed_in_mid_stream_loses_only_its_own_streams(pool: Pool):
    begun = [asyncio.Event(), asyncio.Event()]
    streams = [
        asyncio.create_task(read(pool, model, event)) for model, event in zip(("calm", "to_drain"), begun, strict=True)
    ]
    await asyncio.gather(*(event.wait() for event in begun))
    before = await asyncio.to_thread(pool.ledger)
    victim = replica_of(before, "to_drain")
    assert victim["leases"] == 1
    kill_replica("to_drain", victim["replica"])
    calm, to_drain = await asyncio.gather(*streams)
    assert calm == words("calm", 100)
    assert to_drain.startswith("to_drain:0 ")
    assert to_drain.endswith("<the replica of to_drain went away>")
    after = await asyncio.to_thread(pool.wait, lambda ledger: ledger["models"]["to_drain"]["ready"] == 1)
    assert replica_of(after, "to_drain")["replica"] != victim["replica"]
    assert await read(pool, "to_drain", asyncio.Event(), 5) == words("to_drain", 5)


async def test_the_ledger_dies_and_comes_back_with_every_lease(pool: Pool):
    """Streams go on, their leases are in the new books, and what arrives meanwhile is served."""
    import ray

    from cluster import effects

    begun = asyncio.Event()
    stream = asyncio.create_task(read(pool, "calm", begun))
    await begun.wait()
    before = await asyncio.to_thread(pool.ledger)
    with contextlib.suppress(ray.exceptions.RayActorError):
        ray.kill(effects.find_ledger(), no_restart=False)
    late = asyncio.create_task(read(pool, "to_drain", asyncio.Event(), 5))
    after = await asyncio.to_thread(
        pool.wait, lambda ledger: ledger["epoch"] != before["epoch"] and ledger["leases"] >= 1
    )
    assert replica_of(after, "calm")["replica"] == replica_of(before, "calm")["replica"]
    assert await late == words("to_drain", 5)
    assert await stream == words("calm", 100)
    healed = await asyncio.to_thread(pool.wait, lambda ledger: ledger["leases"] == 0 and not ledger["recovering"])
    assert replica_of(healed, "calm")["replica"] == replica_of(before, "calm")["replica"]
    assert healed["models"]["calm"]["desired"] == 1


async def test_a_ledger_that_fails_inside_ends_itself_and_comes_back_with_every_lease(pool: Pool):
    """An exception in the middle of a decision: nobody knows what the books are worth, so they are made anew."""
    from cluster import effects

    def poison(actor: Any) -> None:
        def decide(event: Any, now: float) -> None:
            raise RuntimeError("poisoned")

        actor._ledger.decide = decide

    begun = asyncio.Event()
    stream = asyncio.create_task(read(pool, "calm", begun))
    await begun.wait()
    before = await asyncio.to_thread(pool.ledger)
    await effects.find_ledger().__ray_call__.remote(poison)
    late = asyncio.create_task(read(pool, "to_drain", asyncio.Event(), 5))
    after = await asyncio.to_thread(
        pool.wait, lambda ledger: ledger["epoch"] != before["epoch"] and ledger["leases"] >= 1
    )
    assert replica_of(after, "calm")["replica"] == replica_of(before, "calm")["replica"]
    assert await late == words("to_drain", 5)
    assert await stream == words("calm", 100)
    await asyncio.to_thread(pool.wait, lambda ledger: ledger["leases"] == 0 and not ledger["recovering"])


async def test_a_ledger_that_is_stopped_costs_a_request_its_own_time_and_nobody_else_anything(pool: Pool):
    import httpx

    from cluster import effects

    begun = asyncio.Event()
    stream = asyncio.create_task(read(pool, "calm", begun))
    await begun.wait()
    pid = await asyncio.to_thread(process_of, effects.find_ledger())
    os.kill(pid, signal.SIGSTOP)
    try:
        body = {"model": "to_drain", "messages": [{"role": "user", "content": "x"}], "timeout_s": 2}
        asked_at = time.monotonic()
        answer = await asyncio.to_thread(httpx.post, f"{pool.url}/v1/chat/completions", json=body, timeout=30)
        assert (answer.status_code, answer.json()["error"]["phase"]) == (504, "queued")
        assert time.monotonic() - asked_at < 12
        status = await asyncio.to_thread(httpx.get, f"{pool.url}/v1/status", timeout=30)
        assert status.status_code == 503
    finally:
        os.kill(pid, signal.SIGCONT)
    assert await read(pool, "to_drain", asyncio.Event(), 5) == words("to_drain", 5)
    assert await stream == words("calm", 100)
    await asyncio.to_thread(pool.wait, lambda ledger: ledger["leases"] == 0 and ledger["queued"] == 0)


async def test_a_replica_that_is_late_keeps_its_device_when_the_ledger_dies(pool: Pool):
    """The new life gives nothing away before it knows what everybody has."""
    import ray

    from cluster import effects

    assert await read(pool, "late", asyncio.Event(), 5) == words("late", 5)
    before = await asyncio.to_thread(pool.ledger)
    replica = replica_of(before, "late")["replica"]
    actor = ray.get_actor(f"SERVE_REPLICA::slotpool#late#{replica}", namespace="serve")
    pid = await asyncio.to_thread(process_of, actor)
    os.kill(pid, signal.SIGSTOP)
    try:
        with contextlib.suppress(ray.exceptions.RayActorError):
            ray.kill(effects.find_ledger(), no_restart=False)
        rival = asyncio.create_task(read(pool, "rival", asyncio.Event(), 5))
        await asyncio.to_thread(pool.wait, lambda ledger: ledger["epoch"] != before["epoch"])
        # Longer than a new life listens when nobody is missing.
        await asyncio.sleep(4)
        meanwhile = await asyncio.to_thread(pool.ledger)
        assert meanwhile["recovering"]
        assert not loaded(meanwhile, "rival")
    finally:
        os.kill(pid, signal.SIGCONT)
    after = await asyncio.to_thread(pool.wait, lambda ledger: not ledger["recovering"])
    assert "late" in {row["model"] for row in after["replicas"] if row["replica"] == replica}
    assert await rival == words("rival", 5)


async def test_an_operators_load_survives_the_ledger(pool: Pool):
    import httpx
    import ray

    from cluster import effects

    url = f"{pool.url}/v1/admin/models/ordered/load"
    loading = asyncio.create_task(asyncio.to_thread(httpx.post, url, timeout=60))
    before = await asyncio.to_thread(pool.wait, lambda ledger: ledger["models"]["ordered"]["state"] == "loading")
    with contextlib.suppress(ray.exceptions.RayActorError):
        ray.kill(effects.find_ledger(), no_restart=False)
    answer = await loading
    assert (answer.status_code, answer.json()["loaded_replicas"]) == (200, 1)
    after = await asyncio.to_thread(pool.wait, lambda ledger: not ledger["recovering"])
    assert after["epoch"] != before["epoch"]
    assert after["models"]["ordered"]["desired"] == 1


async def test_an_ingress_that_dies_gives_its_leases_back(pool: Pool):
    import ray

    begun = asyncio.Event()
    stream = asyncio.create_task(read(pool, "calm", begun))
    await begun.wait()
    actors = [name for name in ray.util.list_named_actors(all_namespaces=True) if "#ingress#" in name["name"]]
    ray.kill(ray.get_actor(actors[0]["name"], namespace="serve"), no_restart=True)
    assert not (await stream).endswith(words("calm", 100)[-10:])

    await asyncio.to_thread(pool.wait, lambda ledger: ledger["leases"] == 0, 60)
    assert await read(pool, "calm", asyncio.Event(), 5) == words("calm", 5)
