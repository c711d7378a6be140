"""Serve's direct ingress on the public port: who leaves is noticed, what is large arrives, and the port comes back."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import aiohttp
import httpx
import pytest

from tests.pool import Pool, fake, running_pool
from tests.sockets import listeners, owner

ARGS = {
    "models": {
        "quick": {**fake(tokens_per_s=500, tokens=10), "target_inflight": 4, "min_replicas": 1},
        "slow": {**fake(tokens_per_s=10, tokens=600), "target_inflight": 1, "min_replicas": 1},
    }
}


@pytest.fixture(scope="module")
def pool(port: int) -> Iterator[Pool]:
    with running_pool(port, ARGS) as pool:
        yield pool
        pool.check()


def chat(model: str, **fields: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": "x"}], **fields}


def ingress_pid(port: int) -> int | None:
    """The process that listens on the public port, or None while there is none."""
    return next((owner(inode) for inode in listeners(port)), None)


async def test_a_client_that_leaves_frees_its_slot_at_once(pool: Pool):
    async with aiohttp.ClientSession() as session:
        answer = await session.post(f"{pool.url}/v1/chat/completions", json=chat("slow", stream=True))
        await answer.content.readline()
        assert (await asyncio.to_thread(pool.ledger))["leases"] == 1
        answer.close()
        left = time.monotonic()
        await asyncio.to_thread(pool.wait, lambda ledger: ledger["leases"] == 0, 10)
        assert time.monotonic() - left < 5


def test_a_large_body_arrives_whole(pool: Pool):
    body = chat("quick", max_tokens=3)
    body["messages"][0]["content"] = "x" * 12_000_000
    with pool.http() as client:
        answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text[:500]


def test_what_other_servers_answer_too(pool: Pool):
    with pool.http() as client:
        assert client.get("/admin/nothing-here").status_code == 404
        assert client.get("/admin/nothing-here").json()["error"]["code"] == "NOT_FOUND"
        assert client.get("/-/healthz").status_code == 200
        answer = client.post("/v1/chat/completions", json=chat("quick"), headers={"X-Request-Id": "mine"})
        assert answer.headers.get_list("x-request-id") == ["mine"]
        refused = client.post("/v1/chat/completions", content=b"{")
        assert refused.status_code == 400
        assert refused.headers["x-request-id"]


def test_a_killed_ingress_comes_back_on_its_port(pool: Pool, port: int):
    """With connections open to the dead one: they linger in the kernel, and must not keep the port."""
    with pool.http() as client, client.stream("POST", "/v1/chat/completions", json=chat("slow", stream=True)) as answer:
        lines = answer.iter_lines()
        next(lines)
        killed = ingress_pid(port)
        assert killed is not None
        os.kill(killed, signal.SIGKILL)
        with pytest.raises(httpx.HTTPError):
            collections.deque(lines, maxlen=0)
    pool.wait(lambda ledger: ledger["leases"] == 0, timeout_s=60)
    assert ingress_pid(port) not in (None, killed)
    with pool.http() as client:
        assert client.post("/v1/chat/completions", json=chat("quick")).status_code == 200


async def test_a_redeploy_does_not_cut_a_stream(pool: Pool, port: int):
    """The old ingress finishes what it has; then the new one answers on the same port."""
    old = ingress_pid(port)
    assert old is not None
    async with aiohttp.ClientSession() as session:
        answer = await session.post(
            f"{pool.url}/v1/chat/completions", json=chat("slow", stream=True, max_tokens=40, timeout_s=60)
        )
        await answer.content.readline()
        await asyncio.to_thread(redeploy)
        text = (await answer.read()).decode()
    events = [json.loads(line[6:]) for line in text.split("\n\n") if line.startswith("data: {")]
    words = "".join(event["choices"][0]["delta"].get("content") or "" for event in events if event["choices"])
    assert words.endswith("slow:39 ")
    assert text.endswith("data: [DONE]\n\n")
    await asyncio.to_thread(wait_for_another_ingress, pool, port, old)


def wait_for_another_ingress(pool: Pool, port: int, old: int) -> None:
    """Until a process other than `old` answers on the public port."""
    deadline = time.monotonic() + 60
    while True:
        with contextlib.suppress(httpx.HTTPError):
            if ingress_pid(port) != old and httpx.get(f"{pool.url}/ready", timeout=5).status_code == 200:
                return
        assert time.monotonic() < deadline, "no new ingress took the port"
        time.sleep(0.1)


def redeploy() -> None:
    """The same pool with another configuration, so that Serve replaces the ingress."""
    from ray.serve._private import api
    from ray.serve.schema import ServeDeploySchema

    from tests.pool import serve_document

    client = api.serve_start()
    client.deploy_apps(ServeDeploySchema.model_validate(serve_document({**ARGS, "queue_max_size": 101})))
