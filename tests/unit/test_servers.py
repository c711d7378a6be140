"""The watch over external servers: recovery, back-off, nudges, and who is followed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from cluster.ledger.events import ServerManifest
from cluster.ledger.specs import ServerSpec
from cluster.servers import manifests
from cluster.servers.manifests import ManifestError, ManifestWatch
from tests.upstream import Upstream


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifests, "PERIOD_S", 0.05)
    monkeypatch.setattr(manifests, "BACKOFF_S", (0.01, 0.05))
    monkeypatch.setattr(manifests, "TIMEOUT_S", 0.3)


@contextlib.asynccontextmanager
async def watching(*specs: ServerSpec) -> AsyncIterator[tuple[ManifestWatch, asyncio.Queue[ServerManifest]]]:
    heard: asyncio.Queue[ServerManifest] = asyncio.Queue()
    watch = ManifestWatch(heard.put_nowait)
    watch.follow(specs)
    try:
        yield watch, heard
    finally:
        await watch.close()


async def until(heard: asyncio.Queue[ServerManifest], models: tuple[str, ...] | None) -> ServerManifest:
    async with asyncio.timeout(10):
        while (event := await heard.get()).models != models:
            pass
    return event


async def test_a_server_goes_and_comes_back(quick):
    upstream = Upstream("m")
    with upstream.listening():
        pass
    async with watching(ServerSpec(upstream.url)) as (_, heard):
        assert "connected" in (await until(heard, None)).error
        with upstream.listening():
            await until(heard, ("m",))
            upstream.models.append("n")
            await until(heard, ("m", "n"))
            upstream.manifest_fault = 503
            assert "503" in (await until(heard, None)).error
            upstream.manifest_fault = None
            await until(heard, ("m", "n"))


async def test_one_slow_answer_of_a_busy_server_is_forgiven_and_the_second_is_not(quick):
    upstream = Upstream("m")
    with upstream.listening():
        async with watching(ServerSpec(upstream.url)) as (_, heard):
            await until(heard, ("m",))
            upstream.manifest_fault = "deaf"
            count = len(upstream.keys)
            async with asyncio.timeout(10):
                while len(upstream.keys) <= count:
                    await asyncio.sleep(0.01)
            assert "in time" in (await until(heard, None)).error
            assert len(upstream.keys) >= count + 2


async def test_a_suspect_is_forgiven_nothing(quick):
    upstream = Upstream("m")
    with upstream.listening():
        async with watching(ServerSpec(upstream.url)) as (watch, heard):
            await until(heard, ("m",))
            upstream.manifest_fault = "deaf"
            count = len(upstream.keys)
            watch.check_now(upstream.url)
            assert "in time" in (await until(heard, None)).error
            assert len(upstream.keys) == count + 1


async def test_a_nudge_reads_at_once_and_nobody_else_is_asked(monkeypatch):
    monkeypatch.setattr(manifests, "BACKOFF_S", (0.01, 0.05))
    upstream = Upstream("m")
    with upstream.listening():
        spec = ServerSpec(upstream.url)
        async with watching(spec) as (watch, heard):
            await until(heard, ("m",))
            upstream.models = ["n"]
            watch.check_now("http://nobody")
            watch.check_now(upstream.url)
            await until(heard, ("n",))
            # The same servers again change nothing; a changed one is read anew; none is none.
            watch.follow([spec])
            watch.follow([ServerSpec(upstream.url, 2)])
            await until(heard, ("n",))
            watch.follow([])
            await asyncio.sleep(0.02)
            assert heard.empty()


async def test_a_manifest_has_a_bound_and_any_broken_answer_a_reason(monkeypatch):
    import httpx

    monkeypatch.setattr(manifests, "MAX_BYTES", 10)
    upstream = Upstream("m")
    async with httpx.AsyncClient() as client:
        with upstream.listening(), pytest.raises(ManifestError, match="too long"):
            await manifests.read_manifest(client, ServerSpec(upstream.url))

        async def nonsense(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"SSH-2.0-OpenSSH\r\n\r\n")
            await writer.drain()
            writer.close()

        listener = await asyncio.start_server(nonsense, "127.0.0.1", 0)
        port = listener.sockets[0].getsockname()[1]
        async with listener:
            with pytest.raises(ManifestError, match="RemoteProtocolError"):
                await manifests.read_manifest(client, ServerSpec(f"http://127.0.0.1:{port}"))
