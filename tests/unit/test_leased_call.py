"""One leased call on a real engine process: its deadline holds, whoever hangs or reads slowly."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from cluster.config import ModelConfig
from cluster.errors import BackendTimeout, PoolError, ReplicaGone
from cluster.ledger.events import Grant
from cluster.orders import Address
from deployments import leased_call
from deployments.engine_child import EngineChild
from deployments.engines.protocol import Call
from deployments.leased_call import LeasedCall, ServeWay, Way
from deployments.link import CHUNK, END, FAILURE, HEAD, Leased, Links, encode_failure
from deployments.sse import DONE
from tests.unit.raylet import Raylet, started_raylet

GONE = ReplicaGone("gone")


@pytest.fixture(scope="module")
def raylet() -> Iterator[Raylet]:
    with started_raylet() as raylet:
        yield raylet


@pytest.fixture
async def engine(raylet: Raylet) -> AsyncIterator[EngineChild]:
    child = await EngineChild.fork(raylet.home, dict(os.environ), raylet.home.folder / "log")
    config = ModelConfig.model_validate({"backend": "fake", "engine_kwargs": {"tokens_per_s": 200}})
    order = {
        "model": "m",
        "replica": "uid",
        "config": config.model_dump(mode="json", by_alias=False),
        "overrides": {},
        "unix": str(raylet.home.folder / "uid"),
        "host": "",
        "token": "",
    }
    await child.load(order, lambda _: None)
    yield child
    child.kill()
    await asyncio.wait_for(asyncio.shield(child.ended), 10)


class Book:
    """What became of a lease."""

    def __init__(self, raylet: Raylet, left_s: float) -> None:
        self.released: list[int | None] = []
        self.suspicions = 0
        self.left_s = left_s
        self._address = Address("here", str(raylet.home.folder / "uid"))
        self._links = Links("here")
        self.call = LeasedCall(left_s, self.released.append, self._suspect)

    def _suspect(self) -> None:
        self.suspicions += 1

    def chunks(self, tokens: int) -> Any:
        async def open_way() -> Way:
            body = {"model": "m", "messages": [], "max_tokens": tokens, "stream": True}
            leased = Leased("uid", "r", 1, self.left_s, Call("/v1/chat/completions", body, "r"))
            return await self._links.call(self._address, leased)

        return self.call.run(open_way, GONE)


async def test_a_call_that_ends_releases_once_and_has_its_report(raylet: Raylet, engine: EngineChild):
    book = Book(raylet, 30.0)
    text = b"".join([chunk async for chunk in book.chunks(3)])
    book.call.end(book.call.status)
    book.call.end(500)
    assert b"m:2 " in text
    assert (book.released, book.suspicions) == ([200], 0)
    assert book.call.report.output_tokens == 3
    assert book.call.headers["content-type"] == "text/event-stream"


async def test_a_reader_that_leaves_behind_the_last_word_leaves_a_report(raylet: Raylet, engine: EngineChild):
    """Clients close their connection at `[DONE]`, and what they have used is counted nevertheless."""
    book = Book(raylet, 30.0)
    async with contextlib.aclosing(book.chunks(3)) as chunks:
        async for chunk in chunks:
            if chunk.endswith(DONE):
                break
    assert book.call.report.output_tokens == 3
    early = Book(raylet, 30.0)
    async with contextlib.aclosing(early.chunks(1000)) as chunks:
        await anext(chunks)
    assert early.call.report.output_tokens is None


async def test_an_engine_that_hangs_ends_at_the_deadline_and_is_suspected(raylet: Raylet, engine: EngineChild):
    book = Book(raylet, 1.0)
    chunks = book.chunks(10_000)
    await anext(chunks)
    os.kill(engine.pid, signal.SIGSTOP)
    with pytest.raises(BackendTimeout):
        while True:
            await asyncio.wait_for(anext(chunks), 10)
    assert (book.released, book.suspicions) == ([504], 1)


async def test_an_engine_that_hangs_before_the_first_byte_as_well(raylet: Raylet, engine: EngineChild):
    os.kill(engine.pid, signal.SIGSTOP)
    book = Book(raylet, 0.2)
    with pytest.raises(BackendTimeout):
        await asyncio.wait_for(anext(book.chunks(1)), 10)
    assert (book.released, book.suspicions) == ([504], 1)


async def test_a_reader_that_stops_loses_its_lease_at_the_deadline_and_blames_nobody(
    raylet: Raylet, engine: EngineChild, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(leased_call, "SLACK_S", 0.1)
    book = Book(raylet, 0.3)
    chunks = book.chunks(10_000)
    await anext(chunks)
    while not book.released:
        await asyncio.sleep(0.02)
    assert (book.released, book.suspicions) == ([504], 0)
    with pytest.raises(BackendTimeout):
        while True:
            await anext(chunks)


async def test_an_engine_that_dies_is_gone_at_once(raylet: Raylet, engine: EngineChild):
    book = Book(raylet, 60.0)
    chunks = book.chunks(10_000)
    await anext(chunks)
    os.kill(engine.pid, signal.SIGSEGV)
    with pytest.raises(ReplicaGone):
        while True:
            await asyncio.wait_for(anext(chunks), 10)
    with pytest.raises(ReplicaGone):
        await anext(Book(raylet, 60.0).chunks(1))


class Items:
    """What Serve's handle gives: frames, then what ends them."""

    def __init__(self, *items: bytes | Exception) -> None:
        self._items = list(items)
        self.cancelled = False

    async def __anext__(self) -> bytes:
        if not self._items:
            await asyncio.Event().wait()
        item = self._items.pop(0)
        if isinstance(item, Exception):
            raise item
        return item

    def cancel(self) -> None:
        self.cancelled = True


LEASE = Grant("r", "h", "m", "uid", (0,), 1, 0.0, 0.0)
HEAD_FRAME = HEAD + b"\x82\xa6status\xcc\xc8\xa7headers\x80"


async def through_serve(left_s: float, *items: bytes | Exception) -> tuple[list[bytes], list[int | None]]:
    source, released, chunks = Items(*items), [], []
    call = LeasedCall(left_s, released.append)

    async def open_way() -> Way:
        return ServeWay(source, LEASE)

    try:
        async for chunk in call.run(open_way, GONE):
            chunks.append(chunk)
    finally:
        call.end(200)
    return chunks, released


async def test_the_way_through_serve_carries_the_same_frames():
    assert await through_serve(9.0, HEAD_FRAME, CHUNK + b"a", END + b"\x80") == ([b"a"], [200])
    with pytest.raises(BackendTimeout, match="slow"):
        await through_serve(9.0, FAILURE + encode_failure(BackendTimeout("slow", phase="running")))
    with pytest.raises(ReplicaGone):
        await through_serve(9.0, HEAD_FRAME, ReplicaGone("the replica of m went away"))
    with pytest.raises(PoolError):
        await through_serve(0.0, HEAD_FRAME)
