"""A thousand clients of every manner over real Serve, while replicas and the ledger are killed under them.

Three models that compete for one logical GPU and one beside them, on the fake engine. Whatever happens to a client,
the books balance in the end: nothing leased, nothing queued, no memory booked beyond what is resident, and the pool
serves. Seeded, except for what the operating system's scheduler adds.
"""

from __future__ import annotations

import asyncio
import collections
import json
import random
from collections.abc import Iterator
from typing import Any

import aiohttp
import pytest

from tests.chaos.test_kills import kill_replica
from tests.pool import Pool, fake, running_pool

CLIENTS = 1000
AT_ONCE = 150
SEED = 20
MODELS = {
    name: {**fake(load_s=0.1, tokens_per_s=200, tokens=20), "num_gpus": 1, "memory_mib": 100, "target_inflight": 8}
    for name in ("a", "b", "c")
}
MODELS["steady"] = {**fake(tokens_per_s=200, tokens=20), "target_inflight": 32, "min_replicas": 1, "memory_mib": 100}
ARGS = {"models": MODELS, "queue_max_size": 200}
#: What a client may be told when it is refused, or when what served it died.
REFUSALS = {429, 502, 503, 504}


@pytest.fixture(scope="module")
def pool(port: int) -> Iterator[Pool]:
    with running_pool(port, ARGS) as pool:
        yield pool
        pool.check()


async def one(session: aiohttp.ClientSession, url: str, rng: random.Random) -> str:
    """One client's life, and how it ended: "whole", "left", "gone" (an error event or a cut) or a status."""
    model = rng.choice([*MODELS, "steady"])
    tokens = rng.randint(1, 40)
    manner = rng.choice(["patient", "patient", "patient", "leaves", "hasty"])
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "x"}],
        "max_tokens": tokens,
        "stream": rng.random() < 0.7,
        "priority": rng.choice(["high", "medium", "low"]),
        "timeout_s": rng.uniform(0.05, 1.0) if manner == "hasty" else 60,
    }
    leaves_after_s = rng.uniform(0.0, 0.5) if manner == "leaves" else 120.0
    try:
        async with asyncio.timeout(leaves_after_s):
            async with session.post(f"{url}/v1/chat/completions", json=body) as answer:
                text = await answer.text()
    except TimeoutError:
        assert manner == "leaves", "no answer within two minutes"
        return "left"
    except aiohttp.ClientError:
        return "gone"
    if answer.status != 200:
        assert answer.status in REFUSALS, (answer.status, text)
        assert json.loads(text)["error"]["code"], text
        return str(answer.status)
    if body["stream"]:
        if '"error"' in text:
            return "gone"
        assert text.endswith("data: [DONE]\n\n"), text[-200:]
        events = [json.loads(line[6:]) for line in text.split("\n\n") if line.startswith("data: {")]
        content = "".join(event["choices"][0]["delta"].get("content") or "" for event in events if event["choices"])
    else:
        content = json.loads(text)["choices"][0]["message"]["content"]
    assert content == "".join(f"{model}:{index} " for index in range(tokens))
    return "whole"


async def kill_now_and_then(pool: Pool, rng: random.Random, done: asyncio.Event) -> int:
    """Kill a replica or the ledger every few seconds; returns the number of processes killed."""
    import ray

    from cluster import effects

    kills = 0
    while not done.is_set():
        await asyncio.sleep(rng.uniform(2.0, 4.0))
        kills += 1
        if kills % 3 == 0:
            ray.kill(effects.find_ledger(), no_restart=False)
            continue
        try:
            snapshot = await asyncio.to_thread(pool.ledger)
        except Exception:
            continue
        ready = [row for row in snapshot["replicas"] if row["state"] == "READY"]
        if ready:
            victim = rng.choice(ready)
            try:
                kill_replica(victim["model"], victim["replica"])
            except ValueError:
                continue
    return kills


async def watch(pool: Pool, done: asyncio.Event) -> list[dict[str, Any]]:
    """What the books showed that they never may, at any look."""
    wrong = []
    while not done.is_set():
        await asyncio.sleep(0.1)
        try:
            snapshot = await asyncio.to_thread(pool.ledger)
        except Exception:
            continue
        # One without a name is only asked for: Serve may still hold the GPU with a replica that it revived by itself.
        # One that sleeps has no device.
        holders = [row for row in snapshot["replicas"] if row["devices"] and row["replica"]]
        resident = sum(1 for row in holders if row["model"] != "steady")
        if any(row["leases"] > row["slots"] for row in snapshot["replicas"]) or resident > 1:
            wrong.append(snapshot)
    return wrong


async def test_a_thousand_clients_and_dying_processes(pool: Pool):
    rng = random.Random(SEED)
    gate = asyncio.Semaphore(AT_ONCE)
    done = asyncio.Event()
    killer = asyncio.create_task(kill_now_and_then(pool, random.Random(SEED + 1), done))
    watcher = asyncio.create_task(watch(pool, done))
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def client(seed: float) -> str:
            async with gate:
                return await one(session, pool.url, random.Random(seed))

        async with asyncio.timeout(300):
            ends = collections.Counter(await asyncio.gather(*(client(rng.random()) for _ in range(CLIENTS))))
        done.set()
        kills = await killer
        assert await watcher == []
        print(dict(ends), "kills:", kills)
        assert sum(ends.values()) == CLIENTS
        assert ends["whole"] > CLIENTS // 4, ends
        assert kills >= 3
        settled = await asyncio.to_thread(
            pool.wait, lambda ledger: not ledger["recovering"] and ledger["leases"] == 0 and ledger["queued"] == 0
        )
        assert settled["submitted"] == settled["finished"] + settled["rejected"]
        # And it serves, every model of it.
        for model in MODELS:
            body = {"model": model, "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
            async with session.post(f"{pool.url}/v1/chat/completions", json=body) as answer:
                assert answer.status == 200, await answer.text()
