"""Real weights over real Serve: text through HTTP and the handle, swaps on one GPU, clients that leave."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import openai
import pytest

from tests.pool import Pool, running_pool, smollm2

PROMPTS = [
    f"{task} {thing}."
    for task in ("Explain", "Write one sentence about", "List two facts about", "Describe", "Say why people like")
    for thing in ("gravity", "the ocean", "bread", "music")
]


@pytest.fixture(scope="module")
def pool(port: int) -> Iterator[Pool]:
    """Two models that both want the only GPU: the same file, but another context and another number of slots."""
    models = {
        "first": smollm2(num_gpus=1, target_inflight=8, enabled=True),
        "second": smollm2(num_gpus=1, target_inflight=2, gguf_n_ctx=512),
    }
    with running_pool(port, {"models": models}) as pool:
        yield pool
        pool.check()


def test_the_rows_tell_what_a_load_took_and_what_another_will_take(pool: Pool):
    with pool.http() as http:
        rows = {row["name"]: row for row in http.get("/v1/admin/models").json()["models"]}
    first, second = rows["first"], rows["second"]
    assert (first["vram_estimate_source"], second["vram_estimate_source"]) == (
        "observed_load_delta",
        "model_artifact_size",
    )
    # 92 MiB of weights, 180 and 22 MiB of cache; the second's estimate counts on a device.
    assert 280 < first["vram_estimate_mib"] < 400
    assert 114 < second["vram_estimate_mib"] < 114 + 600


async def text(client: openai.AsyncOpenAI, model: str, prompt: str, tokens: int = 24) -> str:
    stream = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": prompt}],
        temperature=0,
        max_tokens=tokens,
        stream=True,
    )
    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])


async def test_greedy_text_does_not_depend_on_company_or_path(pool: Pool):
    """20 prompts, alone and 8 at a time: the same text, streamed or whole."""
    async with pool.async_openai() as client:
        alone = [await text(client, "first", prompt) for prompt in PROMPTS]
        slots = asyncio.Semaphore(8)

        async def together(prompt: str) -> str:
            async with slots:
                return await text(client, "first", prompt)

        crowd = await asyncio.gather(*(together(prompt) for prompt in PROMPTS))
        assert crowd == alone
        assert all(len(answer) > 20 for answer in alone)
        whole = await client.chat.completions.create(
            model="first", messages=[{"role": "user", "content": PROMPTS[0]}], temperature=0, max_tokens=24
        )
    assert whole.choices[0].message.content == alone[0]
    assert whole.model_extra["metrics"]["pool_total_wall_ms"] >= whole.model_extra["metrics"]["engine_total_wall_ms"]


def test_the_handle_gives_the_same_text_as_http(pool: Pool):
    from ray import serve

    body = {
        "model": "first",
        "messages": [{"role": "user", "content": PROMPTS[0]}],
        "temperature": 0,
        "max_tokens": 24,
    }
    over_http = pool.openai().chat.completions.create(**body).choices[0].message.content
    handle = serve.get_app_handle("slotpool")
    assert handle.chat.remote(body).result(timeout_s=60)["choices"][0]["message"]["content"] == over_http
    chunks = handle.options(stream=True).chat_stream.remote(body)
    deltas = [chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"]]
    assert "".join(deltas) == over_http


def test_bad_input_is_refused_before_the_engine_and_the_pool_goes_on(pool: Pool):
    client = pool.openai()
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="first", messages=[{"role": "user", "content": "word " * 3000}])
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="first", prompt="x", max_tokens=100_000)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model="first", messages=[{"role": "user", "content": "x"}], response_format={"type": "poem"}
        )
    assert caught.value.param == "response_format"
    assert client.completions.create(model="first", prompt="Once", max_tokens=4).choices[0].text


def test_a_client_that_leaves_stops_the_decode(pool: Pool):
    """Within one second: the slot is free, and the engine's whole speed belongs to the next request."""
    client = pool.openai()
    stream = client.completions.create(model="first", prompt="Once upon a time", max_tokens=900, stream=True)
    next(iter(stream))
    pool.wait(lambda ledger: ledger["leases"] == 1, 1)
    stream.close()
    pool.wait(lambda ledger: ledger["leases"] == 0, 1)


async def test_swaps_between_two_real_models_cut_nothing(pool: Pool):
    resident: set[frozenset[str]] = set()
    done = asyncio.Event()

    async def watch() -> None:
        while not done.is_set():
            ledger = await asyncio.to_thread(pool.ledger)
            resident.add(frozenset(row["model"] for row in ledger["replicas"] if row["devices"]))
            await asyncio.sleep(0.05)

    watcher = asyncio.create_task(watch())
    started = time.monotonic()
    async with pool.async_openai() as client:
        expected = {model: await text(client, model, PROMPTS[0]) for model in ("first", "second")}
        answers = await asyncio.gather(
            *(text(client, model, PROMPTS[0]) for model in ("first", "second") for _ in range(6))
        )
    done.set()
    await watcher
    assert answers == [expected["first"]] * 6 + [expected["second"]] * 6
    assert all(len(models) <= 1 for models in resident), resident
    assert {frozenset({"first"}), frozenset({"second"})} <= resident, "the one device is seen to be taken"
    assert time.monotonic() - started < 120
