"""The whole path over real Serve with the fake engine: leases, disconnects, faults, swaps and bad input."""

from __future__ import annotations

import asyncio
import json
import random
import re
import threading
from collections.abc import Iterator

import httpx
import openai
import pytest
import ray
from ray import serve

from cluster import effects
from cluster.ledger.events import Grant
from cluster.orders import Load, Sleep, Unload, Wake
from deployments.engines.protocol import Call
from deployments.leased_call import ServeWay
from deployments.link import Answer, Leased
from tests.pool import Pool, fake, loaded, running_pool

MODELS = {
    "quick": {**fake(tokens_per_s=1000, tokens=8), "target_inflight": 64, "num_gpus": 0, "min_replicas": 1},
    "slow": {**fake(tokens_per_s=20, tokens=400), "target_inflight": 8, "num_gpus": 0, "min_replicas": 1},
    "tiny-queue": {**fake(tokens_per_s=20, tokens=40), "target_inflight": 1, "max_queued": 1, "min_replicas": 1},
    "a": {**fake(load_s=0.2, tokens_per_s=100, tokens=20), "num_gpus": 1, "target_inflight": 4},
    "b": {**fake(load_s=0.2, tokens_per_s=100, tokens=20), "num_gpus": 1, "target_inflight": 4},
    "late": {**fake(load_s=7, tokens=3)},
    "broken": fake(fault="load_fails"),
    "hung": {**fake(fault="load_hangs"), "load_timeout": 1},
    "cut": fake(fault="cut_mid_stream"),
    "limited": fake(fault="rate_limited"),
    "stuck": {**fake(fault="hang_mid_stream"), "request_timeout": 3, "min_replicas": 1},
    "huge": {**fake(), "num_gpus": 64},
    "by-hand": {**fake(), "activation": "manual"},
}


@pytest.fixture(scope="module")
def pool(port: int) -> Iterator[Pool]:
    with running_pool(port, {"models": MODELS}) as pool:
        yield pool
        pool.check()


def body(model: str, **fields: object) -> dict[str, object]:
    return {"model": model, "messages": [{"role": "user", "content": "hi"}], **fields}


def words(model: str, count: int) -> str:
    return "".join(f"{model}:{index} " for index in range(count))


def test_chat_and_completions_streamed_and_not(pool: Pool):
    client = pool.openai()
    chat = client.chat.completions.create(**body("quick"))
    assert chat.choices[0].message.content == words("quick", 8)
    chunks = list(client.chat.completions.create(**body("quick", max_tokens=5), stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == words("quick", 5)
    text = client.completions.create(model="quick", prompt="x", max_tokens=3)
    assert text.choices[0].text == words("quick", 3)
    parts = client.completions.create(model="quick", prompt="x", max_tokens=3, stream=True)
    assert "".join(part.choices[0].text for part in parts) == words("quick", 3)


async def test_an_engine_is_reached_through_its_replicas_handle(pool: Pool):
    """As one on another machine is that no port leads to. Nobody would notice that this way is broken."""
    (replica,) = (row["replica"] for row in loaded(pool.ledger(), "quick"))
    handle = serve.get_deployment_handle("quick", effects.APP_NAME).options(session_id=replica, stream=True)

    async def answer(**fields: object) -> Answer:
        call = Call("/v1/chat/completions", body("quick", **fields), "r")
        lease = Grant("r", "h", "quick", replica, (0,), 1, 0.0, 0.0)
        answer = Answer(ServeWay(handle.relay.remote(*Leased(replica, "r", 1, 10.0, call).encode()), lease))
        await answer.begin()
        return answer

    streamed = await answer(max_tokens=5, stream=True)
    text = b"".join([chunk async for chunk in streamed.chunks()])
    assert text.count(b"quick:") == 5
    assert streamed.report is not None
    assert streamed.report.output_tokens == 5
    whole = await answer()
    assert whole.status == 200
    assert b"quick:7" in b"".join([chunk async for chunk in whole.chunks()])


def test_a_large_body_passes(pool: Pool):
    """Serve's messages are bounded at 4 MB unless told otherwise."""
    chat = pool.openai().chat.completions.create(**{**body("quick"), "user": "x" * 12_000_000})
    assert chat.choices[0].message.content == words("quick", 8)


def test_models_and_service_routes(pool: Pool):
    client = pool.openai()
    assert {model.id for model in client.models.list()} == set(MODELS)
    assert client.models.retrieve("quick").model_extra["status"] == "loaded"
    with pool.http() as http:
        listed = http.get("/v1/models").json()
        assert set(listed["models"]) <= set(MODELS)
        assert "quick" in listed["models"]
        row = http.get("/v1/models?model=quick").json()
        assert (row["id"], row["object"], row["type"], row["execution_mode"]) == ("quick", "model", "llm", "cpu")
        assert {"backend", "format", "status", "aliases", "context_length", "max_model_len", "capabilities"} <= set(row)
        assert http.get("/v1/models/quick").json() == row
        assert http.get("/v1/models/nope").status_code == 404
        assert http.get("/health").json()["status"] == "healthy"
        assert http.get("/ready").status_code == 200
        status = http.get("/v1/status").json()
        assert status["backends"]["quick"]["is_running"] is True
        (replica,) = loaded(status["ledger"], "quick")
        assert (replica["state"], replica["slots"], replica["leases"]) == ("READY", 64, 0)


def test_every_answer_carries_the_request_id(pool: Pool):
    with pool.http() as http:
        assert http.get("/health", headers={"X-Request-Id": "mine"}).headers["x-request-id"] == "mine"
        assert http.get("/nothing").headers["x-request-id"]
        assert http.post("/v1/chat/completions", json=body("quick")).headers["x-request-id"]


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        (b"{broken", 400, "INVALID_REQUEST"),
        (b"[]", 400, "INVALID_REQUEST"),
        (b"[" * 100_000, 400, "INVALID_REQUEST"),
        (b"\xff\xfe\x00", 400, "INVALID_REQUEST"),
        (json.dumps({"messages": [{"role": "user", "content": "x"}]}).encode(), 400, "MODEL_REQUIRED"),
        (json.dumps(body("nope")).encode(), 404, "MODEL_NOT_FOUND"),
        (json.dumps(body("quick", max_tokens=0)).encode(), 400, "INVALID_REQUEST"),
        (json.dumps(body("quick", max_tokens=-5)).encode(), 400, "INVALID_REQUEST"),
        (json.dumps(body("quick", temperature="hot")).encode(), 400, "INVALID_REQUEST"),
        (json.dumps(body("huge")).encode(), 400, "MEMORY_BUDGET_EXCEEDED"),
        (json.dumps(body("by-hand")).encode(), 503, "model_not_loaded"),
        (json.dumps(body("broken")).encode(), 503, "MODEL_UNAVAILABLE"),
        (json.dumps(body("hung")).encode(), 504, "BACKEND_TIMEOUT"),
        (json.dumps(body("limited")).encode(), 429, "RATE_LIMITED"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_have_their_status_and_leave_the_pool_serving(pool: Pool, content, status, code, stream):
    if stream:
        if not content.startswith(b'{"'):
            return
        content = json.dumps({**json.loads(content), "stream": True}).encode()
    with pool.http() as http:
        answer = http.post("/v1/chat/completions", content=content)
        assert answer.status_code == status, answer.text
        assert answer.json()["error"]["code"] == code
        assert ("retry-after" in answer.headers) == (status in (429, 503))
        assert http.post("/v1/chat/completions", json=body("quick")).status_code == 200


def test_openai_raises_its_own_exceptions(pool: Pool):
    client = pool.openai()
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(**body("nope"))
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(**body("quick", max_tokens=0))
    with pytest.raises(openai.RateLimitError):
        client.chat.completions.create(**body("limited"))


def test_a_cut_stream_ends_in_an_error_event(pool: Pool):
    seen = []
    with pytest.raises(openai.APIError, match="cuts the stream"):
        for chunk in pool.openai().chat.completions.create(**body("cut"), stream=True):
            # A stream that waits is told so by deltas without a text.
            seen.append(chunk.choices[0].delta.content or "")
    assert "".join(seen) == words("cut", 8)


def test_a_hung_engine_ends_at_the_requests_deadline(pool: Pool):
    with pytest.raises(openai.APIError, match="ran longer"):
        list(pool.openai().chat.completions.create(**body("stuck"), stream=True))
    pool.wait(lambda ledger: ledger["leases"] == 0, 2)


def test_waiting_streams_hear_where_they_wait(pool: Pool):
    with pool.http() as http, http.stream("POST", "/v1/chat/completions", json=body("late", stream=True)) as answer:
        text = "".join(answer.iter_text())
    assert re.match(r": loading model=late \d+%\n\n", text)
    assert "late:2 " in text


def test_full_queue_and_queue_deadline(pool: Pool):
    with pool.http() as http:
        holders = []

        def hold():
            with httpx.stream(
                "POST", f"{pool.url}/v1/chat/completions", json=body("tiny-queue", stream=True)
            ) as answer:
                holders.append(answer.status_code)
                answer.read()

        def running_and_waiting(leases, queued):
            return lambda ledger: (
                sum(row["leases"] for row in loaded(ledger, "tiny-queue")) == leases
                and ledger["models"]["tiny-queue"]["queued"] == queued
            )

        first = threading.Thread(target=hold)
        first.start()
        pool.wait(running_and_waiting(1, 0))
        late = []
        second = threading.Thread(
            target=lambda: late.append(
                httpx.post(f"{pool.url}/v1/chat/completions", json=body("tiny-queue", timeout_s=0.5))
            )
        )
        second.start()
        pool.wait(running_and_waiting(1, 1))
        full = http.post("/v1/chat/completions", json=body("tiny-queue"))
        assert (full.status_code, full.json()["error"]["code"]) == (429, "GPU_OVERLOADED")
        assert int(full.headers["retry-after"]) >= 1
        second.join()
        assert (late[0].status_code, late[0].json()["error"]["phase"]) == (504, "queued")
        first.join()
        assert holders == [200]


def test_a_disconnect_frees_the_slot_within_a_second(pool: Pool):
    with pool.http() as http, http.stream("POST", "/v1/chat/completions", json=body("slow", stream=True)) as answer:
        text = answer.iter_text()
        assert next(text)
        pool.wait(lambda ledger: ledger["leases"] == 1, 1)
    pool.wait(lambda ledger: ledger["leases"] == 0, 1)


async def test_two_hundred_random_disconnects_leave_nothing_behind(pool: Pool):
    rng = random.Random(7)

    async def leave_early(client: httpx.AsyncClient, after_s: float, model: str) -> None:
        request = client.post if rng.random() < 0.3 else None
        try:
            async with asyncio.timeout(after_s):
                if request:
                    await request("/v1/chat/completions", json=body(model))
                else:
                    async with client.stream("POST", "/v1/chat/completions", json=body(model, stream=True)) as answer:
                        async for _ in answer.aiter_bytes():
                            pass
        except (TimeoutError, httpx.HTTPError):
            pass

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=pool.url, timeout=60, limits=limits) as client:
        models = ["slow", "tiny-queue", "quick", "a", "b"]
        await asyncio.gather(*(leave_early(client, rng.uniform(0.01, 1.5), rng.choice(models)) for _ in range(200)))
    await asyncio.to_thread(pool.check)


async def test_two_models_share_one_gpu_and_no_stream_is_cut(pool: Pool):
    resident: set[tuple[str, ...]] = set()
    done = asyncio.Event()

    async def watch() -> None:
        async with httpx.AsyncClient(base_url=pool.url, timeout=30) as client:
            while not done.is_set():
                ledger = (await client.get("/v1/status")).json()["ledger"]
                rows = [row for model in "ab" for row in loaded(ledger, model) if row["devices"]]
                resident.add(tuple(f"{row['model']} {row['state']}" for row in rows))
                await asyncio.sleep(0.05)

    async def chat(client: openai.AsyncOpenAI, index: int) -> None:
        model = "ab"[index % 2]
        stream = await client.chat.completions.create(**body(model), stream=True)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        assert text == words(model, 20)

    watcher = asyncio.create_task(watch())
    async with pool.async_openai() as client:
        for index in range(4):
            await chat(client, index)
        await asyncio.gather(*(chat(client, index) for index in range(16)))
    done.set()
    await watcher
    assert max(map(len, resident)) == 1, resident


def test_a_replica_is_told_to_make_room(pool: Pool):
    client = pool.openai()
    client.chat.completions.create(**body("a", max_tokens=1))
    (uid,) = [row["replica"] for row in loaded(pool.ledger(), "a")]
    version, order = ray.get(effects.find_ledger().orders.remote(uid, 0, 5.0), timeout=10)
    assert isinstance(order, Load | Wake)
    next_order = effects.find_ledger().orders.remote(uid, version, 30.0)
    assert not ray.wait([next_order], timeout=0.5)[0]
    client.chat.completions.create(**body("b", max_tokens=1))
    assert isinstance(ray.get(next_order, timeout=5)[1], Sleep | Unload)


def test_another_ray_job_uses_the_handle(pool: Pool):
    from ray import serve

    handle = serve.get_app_handle("slotpool")
    answer = handle.chat.remote(body("quick")).result(timeout_s=30)
    assert answer["choices"][0]["message"]["content"] == words("quick", 8)
    chunks = handle.options(stream=True).chat_stream.remote(body("quick", max_tokens=4))
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == words("quick", 4)
    with pytest.raises(Exception, match="does not exist"):
        handle.chat.remote(body("nope")).result(timeout_s=30)
