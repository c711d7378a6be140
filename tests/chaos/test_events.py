"""The stream of events outlives the ingress that served it: nothing is lost, nothing comes twice."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.pool import Pool, fake, kill_ingress, running_pool

MODELS = {
    "calm": {**fake(tokens_per_s=20, tokens=40), "target_inflight": 8, "min_replicas": 1},
    "visitor": fake(load_s=1, tokens=5),
}


@pytest.fixture(scope="module")
def pool(port: int) -> Iterator[Pool]:
    with running_pool(port, {"models": MODELS}) as pool:
        yield pool
        pool.check()


class Follower:
    """Reads the events of a pool, and comes back with the last id whenever it is cut off."""

    def __init__(self, pool: Pool) -> None:
        self._url = f"{pool.url}/v1/admin/events"
        self.snapshots: list[dict[str, Any]] = []
        self.resets: list[dict[str, Any]] = []
        self.changes: list[dict[str, Any]] = []
        self.last_id = ""
        self.connections = 0
        self.has_heard = asyncio.Event()

    async def run(self) -> None:
        while True:
            headers = {"Last-Event-ID": self.last_id} if self.last_id else {}
            with contextlib.suppress(httpx.HTTPError):
                async with (
                    httpx.AsyncClient(timeout=httpx.Timeout(30, read=20)) as client,
                    client.stream("GET", self._url, headers=headers) as answer,
                ):
                    if answer.status_code == 200:
                        self.connections += 1
                        await self._read(answer)
            await asyncio.sleep(0.1)

    async def _read(self, answer: httpx.Response) -> None:
        fields: dict[str, str] = {}
        async for line in answer.aiter_lines():
            if line:
                name, _, value = line.partition(": ")
                fields[name] = value
                continue
            if "event" in fields:
                self._take(fields)
            fields = {}

    def _take(self, fields: dict[str, str]) -> None:
        data = json.loads(fields["data"])
        self.last_id = fields.get("id", self.last_id)
        kind = fields["event"]
        {"snapshot": self.snapshots, "reset": self.resets}.get(kind, self.changes).append(data)
        self.has_heard.set()


async def log_after(epoch: str, version: int) -> list[Any]:
    """What the ledger's own log says, all of it."""
    from cluster import effects

    return (await effects.find_ledger().changes.remote(epoch, version, 0.0, 100_000)).changes


async def ask(pool: Pool, model: str) -> None:
    async with pool.async_openai() as client:
        await client.chat.completions.create(model=model, messages=[{"role": "user", "content": "x"}])


async def test_events_go_on_exactly_where_the_ingress_died(pool: Pool):
    follower = Follower(pool)
    following = asyncio.create_task(follower.run())
    await follower.has_heard.wait()
    epoch, _, version = follower.last_id.rpartition("-")
    first = int(version)
    # A load, a stream and its leases are under way when the ingress dies.
    lost = [asyncio.create_task(ask(pool, model)) for model in ("calm", "calm", "visitor")]
    await asyncio.to_thread(pool.wait, lambda ledger: ledger["models"]["calm"]["leases"] == 2)
    kill_ingress()
    await asyncio.gather(*lost, return_exceptions=True)
    await asyncio.to_thread(pool.wait, lambda ledger: ledger["leases"] == 0, 60)
    await ask(pool, "visitor")
    await asyncio.to_thread(pool.wait, lambda ledger: ledger["leases"] == 0)
    async with asyncio.timeout(60):
        # It has heard of the last lease, and all that follows it in the log.
        while follower.connections < 2 or len(follower.changes) < len(await log_after(epoch, first)):
            await asyncio.sleep(0.1)
    following.cancel()
    told = [(each["version"], each["kind"], each["model"], each["data"]) for each in follower.changes]
    written = [(each.version, each.kind, each.model, each.data) for each in await log_after(epoch, first)]
    assert [version for version, *_ in told] == list(range(first + 1, first + 1 + len(told)))
    assert told == written[: len(told)]
    assert (len(follower.snapshots), follower.resets) == (1, [])
    assert {"replica", "model", "lease"} <= {kind for _, kind, *_ in told}
