"""The pool's handle over real Serve: from this job and another, in tasks and loops, and what ends with them."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster import errors
from deployments.pool_handle import PoolHandle
from tests.pool import Pool, fake, loaded, running_pool

ROOT = Path(__file__).parents[2]
MODELS = {
    "quick": {**fake(tokens_per_s=1000, tokens=8), "target_inflight": 64, "num_gpus": 0, "min_replicas": 1},
    "single": {**fake(tokens_per_s=20, tokens=4000), "target_inflight": 1, "num_gpus": 0, "min_replicas": 1},
    "double": {**fake(tokens_per_s=500, tokens=4), "target_inflight": 2, "num_gpus": 0, "min_replicas": 1},
    "resident": {**fake(tokens_per_s=500, tokens=4), "num_gpus": 1},
    # Loads nothing: whoever holds its slot works on the device itself.
    "own-work": {**fake(), "num_gpus": 1, "target_inflight": 1},
    "cut": {**fake(fault="cut_mid_stream"), "num_gpus": 0},
}


@pytest.fixture(scope="module")
def pool(port: int) -> Iterator[Pool]:
    with running_pool(port, {"models": MODELS}) as pool:
        yield pool
        pool.check()


@pytest.fixture(scope="module")
def handle(pool: Pool) -> PoolHandle:
    return PoolHandle()


def words(model: str, count: int) -> str:
    return "".join(f"{model}:{index} " for index in range(count))


def leases(pool: Pool, model: str) -> int:
    return sum(row["leases"] for row in loaded(pool.ledger(), model))


def has_leases(model: str, count: int) -> Any:
    return lambda ledger: sum(row["leases"] for row in loaded(ledger, model)) == count


def test_chat_stream_and_embeddings(handle: PoolHandle):
    answer = handle.chat("quick", [{"role": "user", "content": "hi"}], max_tokens=5)
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"]["content"] == words("quick", 5)
    assert answer["usage"]["completion_tokens"] == 5
    chunks = list(handle.stream("quick", "hi"))
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks) == words("quick", 8)
    one, two = handle.embed("quick", ["one", "two"], dimensions=4)
    assert len(one) == len(two) == 4
    assert handle.embed("quick", "one", dimensions=4) == [one]
    assert handle.status().models["quick"].ready == 1


async def test_the_same_on_an_event_loop(handle: PoolHandle):
    answers = await asyncio.gather(*(handle.chat_async("quick", "hi", max_tokens=2) for _ in range(20)))
    assert {answer["choices"][0]["message"]["content"] for answer in answers} == {words("quick", 2)}
    text = [chunk["choices"][0]["delta"].get("content") or "" async for chunk in handle.stream_async("quick", "hi")]
    assert "".join(text) == words("quick", 8)
    assert await handle.embed_async("quick", "one") == handle.embed("quick", "one")
    assert (await handle.status_async()).models["quick"].ready == 1


def test_errors_are_the_pools_own(handle: PoolHandle):
    with pytest.raises(errors.ModelNotFound, match="'nope' does not exist"):
        handle.chat("nope", "hi")
    with pytest.raises(errors.InvalidRequest) as refused:
        handle.chat("quick", "hi", temperature=9)
    assert (refused.value.status, refused.value.param) == (400, "temperature")
    with pytest.raises(errors.ModelNotFound), handle.acquire("nope"):
        pass
    with pytest.raises(errors.InvalidRequest), handle.acquire("quick", slots=0):
        pass
    seen = ""
    with pytest.raises(errors.PoolError, match="cuts the stream"):
        for chunk in handle.stream("cut", "hi"):
            seen += chunk["choices"][0]["delta"].get("content") or ""
    assert seen == words("cut", 8)


def test_a_stream_that_is_closed_frees_its_slot(pool: Pool, handle: PoolHandle):
    with closing(handle.stream("single", "hi")) as stream:
        next(stream)
        assert leases(pool, "single") == 1
    pool.wait(has_leases("single", 0), 10)


async def test_a_call_that_is_cancelled_frees_its_slot(pool: Pool, handle: PoolHandle):
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1):
            await handle.chat_async("single", "hi")
    await asyncio.to_thread(pool.wait, has_leases("single", 0), 10)


def test_a_lease_is_a_slot_that_nobody_else_has(pool: Pool, handle: PoolHandle):
    with handle.acquire("single") as lease:
        assert (lease.model, lease.slots, lease.devices) == ("single", 1, ())
        (row,) = loaded(pool.ledger(), "single")
        assert (row["leases"], row["replica"], row["node"]) == (1, lease.replica, lease.node)
        with pytest.raises(errors.BackendTimeout) as waited:
            handle.chat("single", "hi", max_tokens=1, timeout_s=0.3)
        assert waited.value.extras == {"phase": "queued"}
        for _ in range(2):
            assert lease.chat("hi", max_tokens=3)["choices"][0]["message"]["content"] == words("single", 3)
        lease.check()
        assert leases(pool, "single") == 1, "a call on a lease does not give it back"
    pool.wait(has_leases("single", 0), 10)
    assert handle.chat("single", "hi", max_tokens=1)["choices"][0]["message"]["content"] == "single:0 "
    with pytest.raises(errors.BackendTimeout):
        lease.chat("hi", max_tokens=1)


async def test_a_lease_has_as_many_calls_at_a_time_as_slots(pool: Pool, handle: PoolHandle):
    async with handle.acquire("double", slots=9) as lease:
        assert lease.slots == 2, "clamped to what a replica has"
        answers = await asyncio.gather(*(lease.chat_async("hi") for _ in range(5)))
        assert {answer["choices"][0]["message"]["content"] for answer in answers} == {words("double", 4)}
        text = [chunk["choices"][0]["delta"].get("content") or "" async for chunk in lease.stream_async("hi")]
        assert "".join(text) == words("double", 4)
        await lease.check_async()
    await asyncio.to_thread(pool.wait, has_leases("double", 0), 10)


def test_a_lease_ends_at_its_time_and_its_holder_hears_of_it(pool: Pool, handle: PoolHandle):
    with pytest.raises(errors.BackendTimeout, match="was over before its work"), handle.acquire("single", hold_s=0.5):
        pool.wait(has_leases("single", 0), 10)


def test_what_fails_in_its_block_gives_a_lease_back(pool: Pool, handle: PoolHandle):
    with pytest.raises(ZeroDivisionError), handle.acquire("single"):
        1 / 0
    pool.wait(has_leases("single", 0), 10)


async def test_who_no_longer_waits_for_a_lease_leaves_nothing(pool: Pool, handle: PoolHandle):
    async with handle.acquire("single"):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5), handle.acquire("single"):
                pass
        await asyncio.to_thread(pool.wait, lambda ledger: ledger["models"]["single"]["queued"] == 0, 10)
    await asyncio.to_thread(pool.wait, has_leases("single", 0), 10)


def test_own_work_on_a_device_of_the_pool(pool: Pool, handle: PoolHandle):
    """A model that loads nothing is a place on a device: others are drained for it, and it is not taken back."""
    assert handle.chat("resident", "hi")["choices"][0]["message"]["content"] == words("resident", 4)
    with handle.acquire("own-work", timeout_s=60) as lease:
        assert lease.devices == (0,)
        assert loaded(pool.ledger(), "resident") == []
        with pytest.raises(errors.BackendTimeout):
            handle.chat("resident", "hi", timeout_s=1)
        lease.check()
    assert handle.chat("resident", "hi")["choices"][0]["message"]["content"] == words("resident", 4)


def test_a_handle_travels(handle: PoolHandle):
    assert pickle.loads(pickle.dumps(handle)).status().models.keys() == MODELS.keys()


def test_another_job_uses_the_pool_and_holds_nothing_when_it_is_killed(pool: Pool):
    address = ray.get_runtime_context().gcs_address
    environment = {"PYTHONPATH": str(ROOT), **os.environ, "RAY_AUTH_MODE": "token"}
    job = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("other_job.py")), address],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert job.stdout is not None
        # Ray says on the same stream what it thinks of its workers.
        said = (json.loads(line) for line in job.stdout if line.startswith(("{", "[")))
        chat, stream, vectors, tasks, models, failure, lease = (next(said) for _ in range(7))
        assert chat["choices"][0]["message"]["content"] == words("quick", 8)
        assert "".join(text or "" for text in stream) == words("quick", 3)
        assert [len(vector) for vector in vectors] == [4, 4]
        assert tasks == [words("quick", 8)] * 2
        assert models == sorted(MODELS)
        assert failure["error"]["code"] == "MODEL_NOT_FOUND"
        assert lease == ["single", 1, "single:0 "]
        assert leases(pool, "single") == 1
    finally:
        job.kill()
        job.wait()
    killed = time.monotonic()
    pool.wait(has_leases("single", 0), 60)
    print(f"free {time.monotonic() - killed:.1f} s after the kill")
    assert PoolHandle().chat("single", "hi", max_tokens=1)["choices"][0]["message"]["content"] == "single:0 "


def test_prompts_through_ray_data_have_a_bound(pool: Pool):
    """The example of docs/python.md with fewer prompts."""
    address = ray.get_runtime_context().gcs_address
    run = subprocess.run(
        [sys.executable, "docs/thousand_prompts.py", "--model", "quick", "--prompts", "80", "--max-tokens", "3"],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), **os.environ, "RAY_AUTH_MODE": "token", "RAY_ADDRESS": address},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr[-3000:]
    said = run.stdout.splitlines()
    (summary,) = (line for line in said if line.startswith("80 prompts"))
    assert summary.startswith("80 prompts, 240 tokens in ")
    assert summary.endswith("failed: none")
    (bound,) = (line for line in said if line.startswith("at most "))
    assert 0 <= int(bound.split()[2]) <= 32
