"""Models on the CPU with real weights: a pool that uses no GPU at all, and one that sends there what would wait."""

from __future__ import annotations

import asyncio
from typing import Any

import openai

from tests.pool import Pool, fake, running_pool, smollm2

SEA = "Write one sentence about the sea."


async def answer(client: openai.AsyncOpenAI, model: str, **fields: Any) -> openai.types.chat.ChatCompletion:
    messages: Any = [{"role": "user", "content": SEA}]
    return await client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=16, **fields)


def text_of(said: openai.types.chat.ChatCompletion) -> str:
    return said.choices[0].message.content or ""


def rows(pool: Pool) -> dict[str, Any]:
    with pool.http() as http:
        return {row["name"]: row for row in http.get("/v1/admin/models").json()["models"]}


async def test_in_cpu_mode_a_model_that_wants_a_gpu_answers_without_one(port: int):
    """Two of them would not fit on the one GPU that is there."""
    models = {name: smollm2(num_gpus=1, target_inflight=2, enabled=True) for name in ("one", "other")}
    with running_pool(port, {"models": models, "execution_mode": "cpu"}) as pool:
        async with pool.async_openai() as client:
            one, other = await asyncio.gather(*(answer(client, name) for name in models))
        assert text_of(one) == text_of(other) != ""
        assert all(rows(pool)[name]["is_loaded"] for name in models)
        with pool.http() as http:
            assert http.get("/health").json()["execution_mode"] == "cpu"
            assert {http.get(f"/v1/models/{name}").json()["execution_mode"] for name in models} == {"cpu"}
        pool.check()


async def test_what_would_wait_for_a_gpu_is_answered_on_the_cpu(port: int):
    models = {
        "big": {**fake(tokens=100_000, tokens_per_s=20), "num_gpus": 1, "target_inflight": 1}
        | {"cpu_offload_model": "small"},
        "small": smollm2(target_inflight=2, enabled=True),
    }
    with running_pool(port, {"models": models, "offload_queue_threshold": 1}) as pool:
        async with pool.async_openai() as client:
            alone = await answer(client, "small")
            held = [asyncio.create_task(answer(client, "big", extra_body={"max_tokens": 100_000})) for _ in range(2)]
            await asyncio.to_thread(pool.wait, lambda ledger: ledger["models"]["big"]["queued"] == 1)
            said = await answer(client, "big")
            for each in held:
                each.cancel()
            await asyncio.gather(*held, return_exceptions=True)
        assert (said.model, text_of(said)) == ("small", text_of(alone))
        assert text_of(said)
        pool.check()
