"""The socket between an ingress and a replica: bytes and errors come through, and each end hears of the other's."""

from __future__ import annotations

import asyncio
import contextlib
import stat
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from cluster.errors import BackendTimeout, ReplicaGone
from cluster.ledger.events import Grant
from deployments.direct import DirectServer, call_directly
from deployments.engines.protocol import Call

LEASE = Grant("r1", "h1", "m", "uid", (0,), 1, 0.0, 0.0)


def call(**body: object) -> Call:
    return Call(path="/v1/chat/completions", body=body, request_id="r1")


class Source:
    """What a replica would do: `body["chunks"]`, then the fault that the body names."""

    def __init__(self) -> None:
        self.closed = asyncio.Event()
        self.asked: list[tuple[Grant, Call, float]] = []

    async def __call__(self, lease: Grant, call: Call, timeout_s: float) -> AsyncGenerator[bytes, None]:
        self.asked.append((lease, call, timeout_s))
        try:
            for chunk in call.body["chunks"]:
                yield chunk
            if call.body.get("fault") == "error":
                raise BackendTimeout("too slow", phase="running")
            if call.body.get("fault") == "hang":
                await asyncio.Event().wait()
        finally:
            self.closed.set()


@contextlib.asynccontextmanager
async def serving(path: Path) -> AsyncGenerator[tuple[DirectServer, Source], None]:
    source = Source()
    server = DirectServer(path, source)
    await server.start()
    yield server, source
    await asyncio.wait_for(server.stop(), 5)


async def test_chunks_arrive_as_they_are(tmp_path: Path):
    path = tmp_path / "s"
    chunks = [b"data: 1\n\n", b"", b"x" * 300_000]
    async with serving(path) as (_, source):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        asked = call(chunks=chunks)
        assert [chunk async for chunk in call_directly(path, LEASE, asked, 7.0)] == chunks
        assert source.asked == [(LEASE, asked, 7.0)]
    assert not path.exists()


async def test_an_error_of_the_replica_is_raised_with_its_fields(tmp_path: Path):
    async with serving(tmp_path / "s"):
        got = []
        with pytest.raises(BackendTimeout, match="too slow") as caught:
            async for chunk in call_directly(tmp_path / "s", LEASE, call(chunks=[b"a"], fault="error"), 1):
                got.append(chunk)
        assert got == [b"a"]
        assert caught.value.extras == {"phase": "running"}


async def test_a_client_that_leaves_closes_the_source(tmp_path: Path):
    async with serving(tmp_path / "s") as (_, source):
        chunks = call_directly(tmp_path / "s", LEASE, call(chunks=[b"a"], fault="hang"), 1)
        assert await anext(chunks) == b"a"
        await chunks.aclose()
        await asyncio.wait_for(source.closed.wait(), 5)


async def test_a_client_that_leaves_a_full_pipe_closes_the_source(tmp_path: Path):
    async with serving(tmp_path / "s") as (_, source):
        chunks = call_directly(tmp_path / "s", LEASE, call(chunks=[b"x" * 2**20] * 64), 1)
        await anext(chunks)
        await chunks.aclose()
        await asyncio.wait_for(source.closed.wait(), 5)


async def test_nobody_listens(tmp_path: Path):
    with pytest.raises(ReplicaGone):
        await anext(call_directly(tmp_path / "s", LEASE, call(chunks=[]), 1))


async def test_a_replica_that_dies_in_mid_stream_is_gone(tmp_path: Path):
    async def die(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"\x00\x00\x00\x01ca\x00\x00")
        await writer.drain()
        writer.close()

    async with await asyncio.start_unix_server(die, str(tmp_path / "s")):
        chunks = call_directly(tmp_path / "s", LEASE, call(chunks=[]), 1)
        assert await anext(chunks) == b"a"
        with pytest.raises(ReplicaGone):
            await anext(chunks)


async def test_stop_lets_running_calls_finish_and_takes_no_new_one(tmp_path: Path):
    path = tmp_path / "s"
    go = asyncio.Event()

    async def wait(lease: Grant, call: Call, timeout_s: float) -> AsyncGenerator[bytes, None]:
        yield b"first"
        await go.wait()
        yield b"last"

    server = DirectServer(path, wait)
    await server.start()
    chunks = call_directly(path, LEASE, call(), 1)
    assert await anext(chunks) == b"first"
    stopping = asyncio.create_task(server.stop())
    await asyncio.sleep(0)
    assert not path.exists()
    with pytest.raises(ReplicaGone):
        await anext(call_directly(path, LEASE, call(), 1))
    assert not stopping.done()
    go.set()
    assert [chunk async for chunk in chunks] == [b"last"]
    await asyncio.wait_for(stopping, 5)


async def test_a_client_that_connects_and_says_nothing_holds_nothing_up(tmp_path: Path):
    async with serving(tmp_path / "s"):
        _, writer = await asyncio.open_unix_connection(str(tmp_path / "s"))
        writer.close()
        assert [chunk async for chunk in call_directly(tmp_path / "s", LEASE, call(chunks=[b"a"]), 1)] == [b"a"]
