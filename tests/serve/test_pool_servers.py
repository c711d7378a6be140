"""External servers behind a real pool: real HTTP on both sides, and an upstream that watches the guard."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections.abc import Iterator

import httpx
import openai
import pytest

from tests.pool import Pool, fake, running_pool
from tests.upstream import Upstream


class Site:
    """A pool with a model of its own and three servers: one that loads just in time, one that does not, one to kill."""

    def __init__(self, pool: Pool, lazy: Upstream, eager: Upstream, to_drain: Upstream) -> None:
        self.pool, self.lazy, self.eager, self.to_drain = pool, lazy, eager, to_drain
        self.life = contextlib.ExitStack()
        self.life.enter_context(to_drain.listening())
        self.doomed_lives = True

    def kill_doomed(self) -> None:
        """End the third server, with whatever it runs."""
        self.doomed_lives = False
        self.life.close()

    def revive_doomed(self) -> None:
        self.life.enter_context(self.to_drain.listening())
        self.doomed_lives = True
        self.wait_up(self.to_drain)

    def row(self, upstream: Upstream) -> dict[str, object]:
        return next(row for row in self.pool.ledger()["servers"] if row["url"] == upstream.url)

    def wait_up(self, upstream: Upstream, is_up: bool = True) -> None:
        self.pool.wait(
            lambda ledger: next(row["is_up"] for row in ledger["servers"] if row["url"] == upstream.url) == is_up
        )


@pytest.fixture(scope="module")
def site(port: int) -> Iterator[Site]:
    lazy, eager, to_drain = Upstream("m", "n"), Upstream("m", "both", "shared"), Upstream("only", "shared")
    with to_drain.listening():
        pass
    with lazy.listening(), eager.listening():
        servers = [
            {"url": lazy.url, "max_concurrent": 2, "server_type": "lmstudio"},
            {"url": eager.url, "max_concurrent": 2, "server_type": "vllm"},
            {"url": to_drain.url},
        ]
        local = {**fake(tokens=4, tokens_per_s=1000), "num_gpus": 0, "min_replicas": 1}
        with running_pool(port, {"models": {"local": local}, "servers": servers, "queue_max_size": 500}) as pool:
            site = Site(pool, lazy, eager, to_drain)
            for upstream in (lazy, eager, to_drain):
                site.wait_up(upstream)
            yield site
            pool.check()
            site.kill_doomed()
    assert not lazy.mixed


@pytest.fixture(autouse=True)
def healthy(site: Site) -> Iterator[None]:
    yield
    if not site.doomed_lives:
        site.revive_doomed()
    for upstream in (site.lazy, site.eager, site.to_drain):
        upstream.fault = upstream.manifest_fault = None
        upstream.tokens, upstream.gap_s = 5, 0.0
        site.wait_up(upstream)


def body(model: str, **fields: object) -> dict[str, object]:
    return {"model": model, "messages": [{"role": "user", "content": "hi"}], **fields}


def words(model: str, count: int = 5) -> str:
    return "".join(f"{model}:{index} " for index in range(count))


async def stream(client: httpx.AsyncClient, model: str, **fields: object) -> str:
    """The text of a streamed answer; raises what an OpenAI client would."""
    text = ""
    async with client.stream("POST", "/v1/chat/completions", json=body(model, stream=True, **fields)) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line[6:])
                assert "error" not in chunk, chunk
                text += chunk["choices"][0]["delta"].get("content", "")
    return text


def test_models_of_servers_are_listed_and_answer(site: Site):
    client = site.pool.openai()
    assert {model.id for model in client.models.list()} == {"local", "m", "n", "both", "shared", "only"}
    assert client.models.retrieve("n").model_extra["servers"] == [site.lazy.url]
    assert client.models.retrieve("both").model_extra["status"] == "loaded"
    for model in ("m", "n", "both"):
        answer = client.chat.completions.create(**body(model))
        assert answer.choices[0].message.content == words(model)
        chunks = client.chat.completions.create(**body(model), stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == words(model)
    assert client.chat.completions.create(**body("local")).choices[0].message.content == words("local", 4)
    assert site.lazy.bodies[0]["ttl"] == 300
    assert "ttl" not in site.eager.bodies[0]
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(**body("nope"))
    assert missing.value.body["available_models"] == ["both", "local", "m", "n", "only", "shared"]
    assert missing.value.param == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nope")
    backends = httpx.get(f"{site.pool.url}/v1/status").json()["backends"]
    assert backends[site.lazy.url]["is_healthy"] is True


async def test_slots_are_never_exceeded_and_models_never_mixed(site: Site):
    rng = random.Random(5)
    site.lazy.gap_s = site.eager.gap_s = 0.01
    served = len(site.lazy.served)

    async def one(client: httpx.AsyncClient) -> None:
        await asyncio.sleep(rng.random())
        model = rng.choice(("m", "n", "n", "both"))
        assert await stream(client, model, priority=rng.choice((1, 2, 3))) == words(model)

    async with httpx.AsyncClient(
        base_url=site.pool.url, timeout=60, limits=httpx.Limits(max_connections=200)
    ) as client:
        await asyncio.gather(*(one(client) for _ in range(120)))
    assert site.lazy.peak <= 2
    assert site.eager.peak <= 2
    assert not site.lazy.mixed
    assert len(site.lazy.served) - served > 30
    # One that runs several models at once did so.
    assert site.eager.mixed


async def test_a_client_that_leaves_ends_its_request_upstream(site: Site):
    site.lazy.tokens, site.lazy.gap_s = 1000, 0.05
    aborted = site.lazy.aborted
    async with (
        httpx.AsyncClient(base_url=site.pool.url, timeout=60) as client,
        client.stream("POST", "/v1/chat/completions", json=body("n", stream=True)) as answer,
    ):
        assert await anext(answer.aiter_bytes())
        assert site.row(site.lazy)["current_model"] == "n"
    await asyncio.to_thread(site.pool.wait, lambda ledger: ledger["leases"] == 0, 2)
    assert site.row(site.lazy)["current_model"] is None
    async with asyncio.timeout(5):
        while site.lazy.aborted == aborted:
            await asyncio.sleep(0.01)


def test_what_goes_wrong_upstream_has_its_code(site: Site):
    with site.pool.http() as http:
        for fault, status, code in (
            (400, 502, "upstream_invalid_request"),
            (429, 429, "upstream_rate_limit"),
            (500, 502, "upstream_server_error"),
            ("garbage", 502, "upstream_response_parse_failure"),
        ):
            site.lazy.fault = fault
            answer = http.post("/v1/chat/completions", json=body("n"))
            assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
            assert ("retry-after" in answer.headers) == (status == 429)
        site.lazy.fault = "deaf"
        answer = http.post("/v1/chat/completions", json=body("n", timeout_s=0.5))
        assert (answer.status_code, answer.json()["error"]["phase"]) == (504, "running")


def test_a_cut_stream_ends_in_an_error_event_and_the_server_is_looked_at(site: Site):
    site.lazy.fault = "cut"
    seen = []
    with pytest.raises(openai.APIError, match="was lost"):
        for chunk in site.pool.openai().chat.completions.create(**body("n"), stream=True):
            seen.append(chunk.choices[0].delta.content)
    assert "".join(seen) == words("n", 2)
    site.lazy.fault = None
    site.wait_up(site.lazy)
    assert site.pool.openai().chat.completions.create(**body("n")).choices[0].message.content == words("n")


async def test_a_server_that_dies_fails_nobody_who_can_go_elsewhere_and_comes_back(site: Site):
    pool, to_drain = site.pool, site.to_drain
    to_drain.tokens, to_drain.gap_s = 100, 0.05
    async with httpx.AsyncClient(base_url=pool.url, timeout=30) as client:
        ask = lambda model: asyncio.create_task(client.post("/v1/chat/completions", json=body(model)))  # noqa: E731
        running = asyncio.create_task(client.post("/v1/chat/completions", json=body("only", stream=True)))
        await asyncio.to_thread(pool.wait, lambda ledger: ledger["leases"] == 1)
        queued = ask("only")
        await asyncio.to_thread(pool.wait, lambda ledger: ledger["queued"] == 1)
        died = time.monotonic()
        await asyncio.to_thread(site.kill_doomed)
        # The stream that ran ends in an error event, the request that waited for its slot in an error.
        assert "upstream_connection_error" in (await running).text.splitlines()[-2]
        refused = await queued
        assert (refused.status_code, refused.json()["error"]["code"]) == (502, "upstream_connection_error")
        assert time.monotonic() - died < 8
        # Nobody was told yet that it is gone: whoever meets it is tried again elsewhere.
        answers = await asyncio.gather(*(ask("shared") for _ in range(6)))
        assert [answer.status_code for answer in answers] == [200] * 6
        refused = await ask("only")
        assert (refused.status_code, refused.json()["error"]["code"]) == (502, "upstream_connection_error")
        assert (await client.get("/v1/models/only")).json()["status"] == "failed"
        to_drain.tokens, to_drain.gap_s = 5, 0.0
        await asyncio.to_thread(site.revive_doomed)
        assert (await ask("only")).status_code == 200


async def test_a_dead_server_that_nobody_missed_costs_one_retry(site: Site):
    site.kill_doomed()
    async with httpx.AsyncClient(base_url=site.pool.url, timeout=30) as client:
        answers = await asyncio.gather(
            *(client.post("/v1/chat/completions", json=body("shared", stream=True)) for _ in range(8))
        )
    assert [answer.status_code for answer in answers] == [200] * 8
    assert all("error" not in answer.text for answer in answers)
    site.revive_doomed()


async def test_the_ledgers_death_ends_no_stream_and_mixes_no_models(site: Site):
    import ray

    from cluster import effects

    site.lazy.tokens, site.lazy.gap_s = 60, 0.05
    epoch = site.pool.ledger()["epoch"]
    async with httpx.AsyncClient(base_url=site.pool.url, timeout=60) as client:
        first = asyncio.create_task(stream(client, "n"))
        await asyncio.to_thread(site.pool.wait, lambda ledger: ledger["leases"] == 1)
        ray.kill(effects.find_ledger(), no_restart=False)
        # Nobody knows any more which models there are: it waits for the manifests, and for the running stream.
        second = asyncio.create_task(stream(client, "m"))
        healed = await asyncio.to_thread(site.pool.wait, lambda ledger: ledger["epoch"] != epoch and ledger["leases"])
        assert healed["leases"] >= 1
        assert await first == words("n", 60)
        assert (await second).startswith(words("m"))
    assert not site.lazy.mixed
