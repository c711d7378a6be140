"""`slotpool bench`: bounded, seeded, and honest figures."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import httpx
import pytest

from app.cli.loadtest.plan import LoadPlan
from app.cli.loadtest.report import percentiles, report
from app.cli.loadtest.run import LoadTest, Measured, Sample
from tests.unit.cli.scripted_pool import ScriptedPool, error


def plan(**fields: Any) -> LoadPlan:
    usual = {"model": "m", "requests": 4, "concurrency": 2, "duration_s": 10.0, "prompt_tokens": 40, "max_tokens": 8}
    return LoadPlan(**{**usual, "seed": 7, **fields})


def answer(*words: str, usage: bool = True) -> httpx.Response:
    events = [{"choices": [{"delta": {"content": word}}]} for word in words]
    events += [{"choices": [], "usage": {"completion_tokens": len(words), "prompt_tokens": 5}}] if usage else []
    text = "".join(f"data: {json.dumps(each)}\n\n" for each in events)
    return httpx.Response(200, text=f": queued\n\n{text}data: [DONE]\n\n")


async def measure(plan: LoadPlan, handle: Any) -> Measured:
    transport = httpx.MockTransport(handle)
    async with httpx.AsyncClient(base_url="http://127.0.0.1:1", transport=transport) as client:
        return await LoadTest(plan, client).run()


def test_the_same_seed_asks_the_same():
    assert plan().prompts() == plan().prompts()
    assert plan().prompts() != plan(seed=8).prompts()
    assert len(set(plan(requests=50).prompts())) == 50
    assert plan(rate=10.0).starts() == plan(rate=10.0).starts()
    assert plan().starts() == [0.0] * 4


async def test_every_request_is_measured():
    seen: list[dict[str, Any]] = []

    def handle(request: httpx.Request) -> httpx.Response:
        seen.append(json.loads(request.content))
        return answer("a", "b", "c")

    result = report(plan(), await measure(plan(), handle))
    assert (result["requests"], result["served"], result["failed"]) == (4, 4, 0)
    assert (result["output_tokens"], result["prompt_tokens"]) == (12, 20)
    assert [each["figure"] for each in result["figures"]] == ["TTFT", "TPOT", "end to end"]
    assert all(each["p50"] is not None and each["p50"] <= each["p99"] for each in result["figures"])
    assert {(body["max_tokens"], body["stream"], body["temperature"]) for body in seen} == {(8, True, 0)}


async def test_no_more_than_so_many_at_a_time():
    running = most = 0

    async def handle(request: httpx.Request) -> httpx.Response:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.005)
        running -= 1
        return answer("a")

    await measure(plan(requests=20, concurrency=3), handle)
    assert most == 3


async def test_failures_are_counted_by_their_reason():
    answers = [
        lambda: error(429, "full"),
        lambda: answer(),
        lambda: httpx.Response(200, text='data: {"error": {"message": "died"}}\n\n'),
        lambda: answer("a", usage=False),
    ]

    def handle(request: httpx.Request) -> httpx.Response:
        return answers.pop(0)()

    result = report(plan(), await measure(plan(concurrency=1), handle))
    assert result["failures"] == {"429 full": 1, "an answer without text": 1, "died": 1}
    assert (result["served"], result["output_tokens"]) == (1, 1)


async def test_its_time_is_a_bound():
    async def handle(request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(60)
        return answer("a")

    began = time.monotonic()
    measured = await measure(plan(duration_s=0.1), handle)
    assert measured.stopped
    assert measured.samples == []
    assert time.monotonic() - began < 5
    assert report(plan(), measured)["figures"][0]["p50"] is None


async def test_ctrl_c_shows_what_was_measured():
    """It comes as a cancellation of the task."""
    answered = asyncio.Event()

    async def handle(request: httpx.Request) -> httpx.Response:
        if answered.is_set():
            await asyncio.sleep(60)
        answered.set()
        return answer("a")

    running = asyncio.ensure_future(measure(plan(concurrency=1), handle))
    await answered.wait()
    await asyncio.sleep(0.05)
    running.cancel()
    measured = await running
    assert (measured.stopped, len(measured.samples)) == (True, 1)


def test_percentiles_are_nearest_ranks():
    values = [index / 100 for index in range(1, 101)]
    found = percentiles(values)
    assert found == {"mean": 0.505, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    assert percentiles([2.0]) == {"mean": 2.0, "p50": 2.0, "p90": 2.0, "p99": 2.0, "max": 2.0}


def test_time_per_token_leaves_the_first_out():
    assert Sample(0.0, ttft_s=1.0, total_s=3.0, output_tokens=5).tpot_s == 0.5
    assert Sample(0.0, ttft_s=1.0, total_s=1.0, output_tokens=1).tpot_s is None


@pytest.fixture
def pool() -> ScriptedPool:
    pool = ScriptedPool()
    pool.on("GET /v1/models", {"data": [{"id": "cold"}, {"id": "warm", "status": "loaded"}]})
    pool.on("POST /v1/chat/completions", lambda request: answer("a", "b"))
    return pool


def test_the_command_prints_a_table_or_json(pool: ScriptedPool):
    result = pool.run("bench", "--requests", "5", "--concurrency", "2")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0].startswith("warm: 5 of 5 requests served in ")
    assert lines[1].split() == ["MEAN", "P50", "P90", "P99", "MAX"]
    assert [line.split()[0] for line in lines[2:]] == ["TTFT", "TPOT", "end"]
    shown = json.loads(pool.run("bench", "--json", "--model", "cold").stdout)
    assert (shown["model"], shown["served"], shown["seed"]) == ("cold", 64, 0)


def test_other_machines_need_a_word(pool: ScriptedPool):
    result = pool.run("bench", "http://somewhere.example")
    assert result.exit_code == 2
    assert "--yes-remote" in result.output
    assert pool.asked == []
    key = {"SLOTPOOL_API_KEY": "mine"}
    assert pool.run("bench", "http://somewhere.example", "--yes-remote", "--requests", "1", env=key).exit_code == 0
    assert not [each for each in pool.asked if "authorization" in each.headers], "the pool's key is the pool's"
    assert pool.run("bench", "http://127.0.0.1:8000", "--requests", "1", env=key).exit_code == 0
    assert pool.asked[-1].headers["authorization"] == "Bearer mine"


def test_a_server_that_serves_nothing_is_a_failure(pool: ScriptedPool):
    pool.on("POST /v1/chat/completions", lambda request: error(503, "no"))
    result = pool.run("bench", "--requests", "2")
    assert result.exit_code == 1
    assert "failed: 2 x 503 no" in result.output
