"""A thousand requests in one moment for one model with 256 slots: all are answered, none is refused.

What could break: the listen backlogs of the public port and of the link, the limit of open files, and calls to the
ledger or to the engine that time out because everybody waits in the same line.
"""

from __future__ import annotations

import asyncio
import collections
import json
from collections.abc import Iterator

import aiohttp
import pytest

from tests.pool import Pool, fake, running_pool

CLIENTS = 1000
TOKENS = 5
MODELS = {"m": {**fake(tokens_per_s=50, tokens=TOKENS), "target_inflight": 256, "min_replicas": 1}}


@pytest.fixture(scope="module")
def pool(port: int) -> Iterator[Pool]:
    with running_pool(port, {"models": MODELS, "queue_max_size": 2 * CLIENTS}) as pool:
        yield pool
        pool.check()


async def one(session: aiohttp.ClientSession, url: str, stream: bool) -> str:
    """How one request ended: "whole", or what it was told instead."""
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], "stream": stream, "timeout_s": 240}
    async with session.post(f"{url}/v1/chat/completions", json=body) as answer:
        text = await answer.text()
    if answer.status != 200:
        return f"{answer.status} {text}"
    if not stream:
        content = json.loads(text)["choices"][0]["message"]["content"]
    else:
        events = [json.loads(line[6:]) for line in text.split("\n\n") if line.startswith("data: {")]
        if any("error" in event for event in events) or not text.endswith("data: [DONE]\n\n"):
            return text
        content = "".join(event["choices"][0]["delta"].get("content") or "" for event in events if event["choices"])
    return "whole" if content == "".join(f"m:{index} " for index in range(TOKENS)) else text


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
async def test_a_thousand_requests_at_once(pool: Pool, stream: bool):
    timeout = aiohttp.ClientTimeout(total=240)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        ends = collections.Counter(await asyncio.gather(*(one(session, pool.url, stream) for _ in range(CLIENTS))))
    assert ends == {"whole": CLIENTS}
