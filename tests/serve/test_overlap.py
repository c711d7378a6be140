"""A minute of overlapping streams on one model, and visitors who want another model on the same GPU: real weights."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import openai
import pytest

from tests.pool import Pool, requantised, running_pool, smollm2

MINUTE_S = 60.0
STREAMS = 4
TOKENS = 48
MAX_WAIT_S = {"high": 10, "medium": 14, "low": 18}
#: When each visitor arrives, in seconds: long after the one before has had his place and lost it again.
VISITS = {"high": 2.0, "medium": 18.0, "low": 37.0}


@pytest.fixture(scope="module")
def pool(port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    second = requantised(tmp_path_factory.mktemp("weights"))
    models = {
        "resident": smollm2(num_gpus=1, target_inflight=STREAMS, enabled=True),
        "visited": smollm2(num_gpus=1, target_inflight=2, model_path=second),
    }
    with running_pool(port, {"models": models, "max_wait_s": MAX_WAIT_S}) as pool:
        yield pool
        pool.check()


async def text(client: openai.AsyncOpenAI, model: str, priority: str) -> tuple[str, str | None, float]:
    """A greedy stream's text, why it ended, and the wait for its slot in seconds. Raises if it was cut."""
    stream = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Tell me about the sea."}],
        temperature=0,
        max_tokens=TOKENS,
        stream=True,
        extra_body={"priority": priority},
    )
    words, finish, metrics = "", None, {}
    async for chunk in stream:
        if chunk.choices:
            words += chunk.choices[0].delta.content or ""
            finish = chunk.choices[0].finish_reason or finish
        metrics = (chunk.model_extra or {}).get("metrics") or metrics
    return words, finish, (metrics["engine_queue_wait_ms"] + metrics["engine_load_wait_ms"]) / 1000


async def test_visitors_of_every_priority_get_in_and_no_stream_is_cut(pool: Pool):
    end = time.monotonic() + MINUTE_S
    async with pool.async_openai() as client:
        *whole, _ = await text(client, "resident", "medium")
        *other, _ = await text(client, "visited", "medium")
        assert whole[1] == other[1] == "length"
        assert whole[0] != other[0]
        started = time.monotonic()
        streams = 0

        async def stay(delay_s: float) -> None:
            # Each begins while the others are in the middle of theirs: the resident never idles by itself.
            nonlocal streams
            await asyncio.sleep(delay_s)
            while time.monotonic() < end:
                *answer, _ = await text(client, "resident", "medium")
                assert answer == whole
                streams += 1

        async def visit(priority: str) -> float:
            await asyncio.sleep(max(0.0, started + VISITS[priority] - time.monotonic()))
            *answer, waited_s = await text(client, "visited", priority)
            assert answer == other
            return waited_s

        stays = asyncio.gather(*(stay(0.5 * number) for number in range(STREAMS)))
        waits = dict(zip(VISITS, await asyncio.gather(*map(visit, VISITS)), strict=True))
        await stays
    print(f"{streams} streams; waits for a slot: {waits}")
    assert all(waits[priority] <= MAX_WAIT_S[priority] for priority in VISITS), waits
