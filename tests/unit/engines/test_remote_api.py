"""A remote API with its price: what it is sent, what its failures are called, and how often it is asked."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from cluster.config import ModelConfig
from cluster.errors import PoolError, ReplicaGone
from deployments.engines.protocol import Call, Engine
from deployments.engines.registry import build_engine
from tests.upstream import Upstream

KEY = "sk-very-secret"


@pytest.fixture
def upstream(monkeypatch: pytest.MonkeyPatch) -> Iterator[Upstream]:
    monkeypatch.setenv("REMOTE_KEY", KEY)
    with Upstream("big").listening() as upstream:
        yield upstream


def remote(url: str, **keys: Any) -> Engine:
    given = {"backend": "openai_compatible", "remote_base_url": url, "remote_api_key_env": "REMOTE_KEY", **keys}
    return build_engine("mine", ModelConfig.model_validate(given), "")


def call(path: str = "/v1/chat/completions", **fields: Any) -> Call:
    return Call(path, {"model": "mine", "messages": [{"role": "user", "content": "hi"}], **fields}, "r")


async def read(engine: Engine, asked: Call) -> bytes:
    reply = await engine.call(asked)
    async with contextlib.aclosing(reply.chunks) as chunks:
        return b"".join([chunk async for chunk in chunks])


async def test_it_is_asked_by_its_own_name_and_answers_by_ours(upstream: Upstream):
    engine = remote(upstream.url, remote_model="big", remote_thinking="disabled")
    await engine.load(lambda _: None)
    assert not upstream.bodies, "a load asks nobody"
    body = json.loads(await read(engine, call(temperature=0.5)))
    assert body["model"] == "mine"
    assert body["metrics"]["engine_total_wall_ms"] > 0
    assert upstream.keys == [f"Bearer {KEY}"]
    sent = upstream.bodies[0]
    assert (sent["model"], sent["temperature"], sent["thinking"]) == ("big", 0.5, {"type": "disabled"})
    events = (await read(engine, call(stream=True))).split(b"\n\n")
    assert {json.loads(event[6:])["model"] for event in events if event.startswith(b"data: {")} == {"mine"}
    assert "big:0 " in events[0].decode()
    await engine.unload()


@pytest.mark.parametrize(
    ("base", "path"),
    [("", "/v1/chat/completions"), ("/", "/v1/chat/completions"), ("/api/v3/", "/api/v3/chat/completions")],
)
async def test_the_base_url_is_what_stands_before_the_route(upstream: Upstream, base: str, path: str):
    await read(remote(upstream.url + base), call())
    assert upstream.paths == [path]


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        (400, 502, "upstream_invalid_request"),
        (401, 502, "upstream_authentication_failure"),
        (403, 502, "upstream_authentication_failure"),
        (429, 429, "upstream_rate_limit"),
        (500, 502, "upstream_server_error"),
        ("garbage", 502, "upstream_response_parse_failure"),
        ("deaf", 504, "upstream_timeout"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_failure_has_its_code_and_no_second_attempt(
    upstream: Upstream, fault: str | int, status: int, code: str, stream: bool, caplog: pytest.LogCaptureFixture
):
    upstream.fault = fault
    engine = remote(upstream.url, remote_timeout_s=0.3)
    with caplog.at_level(logging.DEBUG), pytest.raises(PoolError) as caught:
        await read(engine, call(stream=stream))
    assert (caught.value.status, caught.value.code) == (status, code)
    assert not isinstance(caught.value, ReplicaGone), "the gateway would ask again"
    assert len(upstream.bodies) == 1
    assert KEY not in caplog.text + str(caught.value.body())


async def test_one_that_is_away_or_cuts_its_stream_is_a_connection_error(upstream: Upstream):
    upstream.fault = "cut"
    seen = b""
    with pytest.raises(PoolError) as cut:
        reply = await remote(upstream.url).call(call(stream=True))
        async for chunk in reply.chunks:
            seen += chunk
    assert b"mine:0" in seen
    away = Upstream()
    with away.listening():
        pass
    with pytest.raises(PoolError) as gone:
        await read(remote(away.url), call())
    for error in (cut.value, gone.value):
        assert (error.status, error.code) == (502, "upstream_connection_error")
        assert not isinstance(error, ReplicaGone)


async def test_it_is_asked_again_only_if_the_configuration_says_so(upstream: Upstream, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("deployments.engines.openai_upstream.RETRY_S", 0.05)
    upstream.fault = 500
    asking = asyncio.create_task(read(remote(upstream.url, remote_max_retries=3), call()))
    while len(upstream.bodies) < 2:
        await asyncio.sleep(0.005)
    upstream.fault = None
    assert b"mine:0" in await asking


async def test_without_its_key_nothing_is_sent(upstream: Upstream, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("REMOTE_KEY")
    engine = remote(upstream.url)
    await engine.load(lambda _: None)
    with pytest.raises(PoolError) as caught:
        await read(engine, call())
    assert (caught.value.status, caught.value.code) == (500, "missing_api_key_env")
    assert not upstream.keys


async def test_it_has_no_other_routes(upstream: Upstream):
    for path in ("/v1/embeddings", "/tokenize"):
        with pytest.raises(PoolError, match=f"does not serve {path}"):
            await read(remote(upstream.url), call(path))


async def test_a_client_that_leaves_ends_the_request_upstream(upstream: Upstream):
    upstream.gap_s, upstream.tokens = 0.05, 1000
    reply = await remote(upstream.url).call(call(stream=True))
    assert b"mine:0" in await anext(reply.chunks)
    await reply.chunks.aclose()
    async with asyncio.timeout(5):
        while not upstream.aborted:
            await asyncio.sleep(0.01)
