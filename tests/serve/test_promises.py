"""What the policy promises, over real Serve with fake engines: who is let in when, and what that costs the others."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

import openai

from tests.pool import REPLICAS_STAY, Pool, fake, running_pool

LOAD_S = 0.3
STREAMS = 4
#: Seconds within which a visitor has his first word. The high one's is the bound of whoever configures none: it grows
#: with what a swap takes, which is a second and more where it passes through Serve.
HIGH_S, LOW_S = (5.0, 12.0) if REPLICAS_STAY else (10.0, 15.0)
BURST = 45
#: The throughput that bounds must leave of what a pool without bounds has.
SHARE = 0.85 if REPLICAS_STAY else 0.75


def pool_of(**keys: Any) -> dict[str, Any]:
    model = {**fake(load_s=LOAD_S, tokens_per_s=50), "num_gpus": 1, "target_inflight": STREAMS}
    return {"models": {"one": model, "two": model}, "queue_max_size": 3 * BURST, **keys}


async def stream(client: openai.AsyncOpenAI, model: str, tokens: int, priority: str = "medium") -> float:
    """Read a stream to its end; the wait for its first word, in seconds."""
    asked, first_s, text = time.monotonic(), None, ""
    chunks = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "x"}],
        max_tokens=tokens,
        stream=True,
        extra_body={"priority": priority},
    )
    async for chunk in chunks:
        text += chunk.choices[0].delta.content or ""
        if text and first_s is None:
            first_s = time.monotonic() - asked
    assert text == "".join(f"{model}:{index} " for index in range(tokens)), "nobody is cut"
    assert first_s is not None
    return first_s


async def test_visitors_get_in_between_overlapping_streams_and_nobody_is_cut(port: int):
    with running_pool(port, pool_of(max_wait_s={"low": LOW_S})) as pool:
        async with pool.async_openai() as client:
            # Each has loaded once: what a swap takes is known.
            for model in ("two", "one"):
                await stream(client, model, 2)
            done = asyncio.Event()

            async def stay(delay_s: float) -> None:
                await asyncio.sleep(delay_s)
                while not done.is_set():
                    await stream(client, "one", 100)

            stays = asyncio.gather(*(stay(0.5 * number) for number in range(STREAMS)))
            await asyncio.sleep(3)
            high_s = await stream(client, "two", 2, "high")
            await asyncio.sleep(5)
            low_s = await stream(client, "two", 2, "low")
            done.set()
            await stays
        await asyncio.to_thread(pool.check)
    print({"high": high_s, "low": low_s})
    assert high_s <= HIGH_S
    assert low_s <= LOW_S


async def cleared_s(pool: Pool) -> float:
    """How long it takes until a burst for two models at once is answered, in seconds."""
    rng = random.Random(7)
    asks = [(model, rng.randint(50, 80)) for model in ("one", "two") for _ in range(BURST)]
    async with pool.async_openai() as client:
        # Both have been loaded, and `one` is.
        for model in ("two", "one"):
            await stream(client, model, 2)
        started = time.monotonic()
        await asyncio.gather(*(stream(client, model, tokens) for model, tokens in asks))
        took_s = time.monotonic() - started
    await asyncio.to_thread(pool.check)
    return took_s


async def test_bounds_leave_a_burst_its_throughput(port: int):
    """Long enough that those of `two` come to their bound while `one` has not served all of its own."""
    took_s = {}
    for name, bounds in (("bounded", {}), ("unbounded", dict.fromkeys(("high", "medium", "low"), 100_000))):
        with running_pool(port, pool_of(max_wait_s=bounds)) as pool:
            took_s[name] = await cleared_s(pool)
    print(took_s)
    assert took_s["unbounded"] >= SHARE * took_s["bounded"], took_s
