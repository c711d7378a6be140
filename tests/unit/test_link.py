"""The link between an ingress and an engine process: bytes and errors come through, each end hears of the other's."""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
import subprocess
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from cluster import frames
from cluster.errors import BackendTimeout, ModelNotFound, PoolError, ReplicaGone
from cluster.frames import BUFFER, ConnectionEnded, check_private, frame, make_private
from cluster.orders import Address
from deployments import link
from deployments.engines.protocol import Call, Reply, Report
from deployments.link import Answer, Leased, LinkCall, Links
from deployments.link_server import LinkServer
from tests.sockets import tcp

CHAT = "/v1/chat/completions"


def call(**body: object) -> Call:
    return Call(path=CHAT, body=body, request_id="r1", headers={"x": "y"})


def leased(asked: Call, timeout_s: float = 60.0, replica: str = "uid") -> Leased:
    return Leased(replica, "r1", 1, timeout_s, asked)


class Source:
    """An engine: `body["chunks"]`, then the fault that the body names."""

    def __init__(self) -> None:
        self.closed = asyncio.Event()
        self.sent = 0
        self.asked: list[Call] = []

    async def __call__(self, call: Call) -> Reply:
        self.asked.append(call)
        if call.json.get("fault") == "refuses":
            raise ModelNotFound("no such model", param="model", available_models=["a"])
        return Reply(call.json.get("status", 200), {"content-type": "x/y"}, self.chunks(call), Report(output_tokens=7))

    async def chunks(self, call: Call) -> AsyncGenerator[bytes, None]:
        body: dict[str, Any] = call.json
        try:
            for chunk in [call.body] if isinstance(call.body, bytes) else [each.encode() for each in body["chunks"]]:
                yield chunk
                self.sent += len(chunk)
            if body.get("fault") == "error":
                raise BackendTimeout("too slow", phase="running")
            if body.get("fault") == "broken":
                raise KeyError("secret")
            if body.get("fault") == "hangs":
                await asyncio.Event().wait()
        finally:
            self.closed.set()


@contextlib.asynccontextmanager
async def serving(
    folder: Path, respond: Callable[[Call], Awaitable[Reply]] | None = None, tcp: bool = False
) -> AsyncGenerator[tuple[Address, Links, Source], None]:
    source = Source()
    server = LinkServer("m", "uid", respond or source)
    path = make_private(folder / "pool") / "s"
    await server.listener.listen_unix(path)
    address = Address("here", str(path))
    if tcp:
        address = Address(
            "there", str(path), "127.0.0.1", await server.listener.listen_tcp("127.0.0.1", "secret"), "secret"
        )
    links = Links("here")
    yield address, links, source
    links.close()
    server.listener.stop()
    await asyncio.wait_for(server.finished(), 5)


async def read(way: LinkCall) -> tuple[Answer, list[bytes]]:
    answer = Answer(way)
    try:
        await answer.begin()
        return answer, [chunk async for chunk in answer.chunks()]
    finally:
        way.close()


@pytest.mark.parametrize("tcp", [False, True])
async def test_an_answer_arrives_as_it_is(tmp_path: Path, tcp: bool):
    async with serving(tmp_path, tcp=tcp) as (address, links, source):
        assert stat.S_IMODE(os.stat(address.unix).st_mode) == 0o600
        asked = call(chunks=["data: 1\n\n", "x" * 3_000_000], status=201)
        answer, chunks = await read(await links.call(address, leased(asked)))
        assert b"".join(chunks) == b"data: 1\n\n" + b"x" * 3_000_000
        assert (answer.status, answer.headers) == (201, {"content-type": "x/y"})
        assert answer.report is not None
        assert answer.report.output_tokens == 7
        assert source.asked == [asked]


async def test_raw_bodies_are_bytes_both_ways(tmp_path: Path):
    async with serving(tmp_path) as (address, links, _):
        asked = Call(path="/v1/audio", body=b"\x00\xff", request_id="r", method="PUT", query="a=b")
        _, chunks = await read(await links.call(address, leased(asked)))
        assert chunks == [b"\x00\xff"]


async def test_a_connection_is_used_again_after_a_clean_end(tmp_path: Path):
    async with serving(tmp_path) as (address, links, _):
        first = await links.call(address, leased(call(chunks=["a"])))
        await read(first)
        with pytest.raises(ModelNotFound):
            await read(await links.call(address, leased(call(fault="refuses"))))
        last = await links.call(address, leased(call(chunks=["a"])))
        assert last._connection is first._connection
        await read(last)


async def test_idle_connections_are_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(link, "IDLE_S", 0.01)
    async with serving(tmp_path) as (address, links, _):
        way = await links.call(address, leased(call(chunks=["a"])))
        await read(way)
        while not way._connection.is_closed:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_refusal_is_raised_with_its_fields(tmp_path: Path, stream: bool):
    async with serving(tmp_path) as (address, links, _):
        with pytest.raises(ModelNotFound, match="no such model") as caught:
            await read(await links.call(address, leased(call(fault="refuses", stream=stream))))
        assert (caught.value.param, caught.value.extras) == ("model", {"available_models": ["a"]})


async def test_a_later_failure_of_a_stream_is_an_event_and_of_a_body_an_error(tmp_path: Path):
    async with serving(tmp_path) as (address, links, _):
        asked = call(chunks=["data: 1\n\n"], fault="error", stream=True)
        _, chunks = await read(await links.call(address, leased(asked)))
        assert chunks[0] == b"data: 1\n\n"
        assert b"too slow" in chunks[-1]
        with pytest.raises(BackendTimeout, match="too slow") as caught:
            await read(await links.call(address, leased(call(chunks=["{"], fault="error"))))
        assert caught.value.extras == {"phase": "running"}
        with pytest.raises(PoolError, match="the engine of m failed: KeyError"):
            await read(await links.call(address, leased(call(chunks=[], fault="broken"))))


async def test_a_run_is_bounded(tmp_path: Path):
    async with serving(tmp_path) as (address, links, source):
        with pytest.raises(BackendTimeout):
            await read(await links.call(address, leased(call(chunks=["a"], fault="hangs"), timeout_s=0.05)))
        await asyncio.wait_for(source.closed.wait(), 5)


async def test_a_lease_on_another_replica_is_refused(tmp_path: Path):
    async with serving(tmp_path) as (address, links, source):
        with pytest.raises(ReplicaGone):
            await read(await links.call(address, leased(call(chunks=["a"]), replica="other")))
        assert source.asked == []


async def test_a_client_that_leaves_closes_the_source(tmp_path: Path):
    async with serving(tmp_path) as (address, links, source):
        way = await links.call(address, leased(call(chunks=["a"], fault="hangs")))
        answer = Answer(way)
        await answer.begin()
        assert await anext(answer.chunks()) == b"a"
        way.close()
        await asyncio.wait_for(source.closed.wait(), 5)


async def test_a_slow_reader_stops_the_engine_and_leaving_ends_it(tmp_path: Path):
    async with serving(tmp_path) as (address, links, source):
        way = await links.call(address, leased(call(chunks=["x" * 10_000] * 2000)))
        answer = Answer(way)
        await answer.begin()
        chunks = answer.chunks()
        await anext(chunks)
        seen = -1
        while source.sent != seen:
            seen = source.sent
            await asyncio.sleep(0.1)
        # What the two processes and the kernel may hold, with its buffers counted twice.
        assert seen < 4 * BUFFER + 2 * 2 * 212_992
        assert not source.closed.is_set()
        way.close()
        await asyncio.wait_for(source.closed.wait(), 5)


async def test_giving_up_on_an_engine_wakes_the_reader(tmp_path: Path):
    async with serving(tmp_path) as (address, links, _):
        way = await links.call(address, leased(call(chunks=[], fault="hangs")))
        reading = asyncio.create_task(read(way))
        await asyncio.sleep(0.01)
        way.fail(BackendTimeout("hangs", phase="running"))
        with pytest.raises(BackendTimeout, match="hangs"):
            await reading


async def test_a_thousand_calls_at_once(tmp_path: Path):
    frames.raise_file_limit()
    async with serving(tmp_path) as (address, links, source):

        async def one() -> list[bytes]:
            return (await read(await links.call(address, leased(call(chunks=["a"])))))[1]

        assert await asyncio.gather(*(one() for _ in range(1000))) == [[b"a"]] * 1000
        assert len(source.asked) == 1000


async def test_both_ends_probe_a_tcp_connection_that_is_silent(tmp_path: Path):
    """Of a machine that is gone nothing else is heard. 02 is the kernel's timer for that."""
    async with serving(tmp_path, tcp=True) as (address, links, _):
        await read(await links.call(address, leased(call(chunks=["x"]))))
        timers = [each.timer for each in tcp() if not each.listens and address.port in (each.port, each.other)]
        assert timers == ["02", "02"]


async def test_nobody_listens(tmp_path: Path):
    make_private(tmp_path / "pool")
    with pytest.raises(FileNotFoundError):
        await Links("here").call(Address("here", str(tmp_path / "pool" / "s")), leased(call()))


async def test_an_engine_that_dies_in_mid_stream_is_heard_of(tmp_path: Path):
    async def die(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(frame(link.HEAD, b"\x82\xa6status\xcc\xc8\xa7headers\x80") + b"\x00\x00\x00\x09ca")
        await writer.drain()
        writer.close()

    path = make_private(tmp_path / "pool") / "s"
    async with await asyncio.start_unix_server(die, str(path)):
        way = await Links("here").call(Address("here", str(path)), leased(call()))
        with pytest.raises(ConnectionEnded):
            await read(way)


@pytest.mark.parametrize("said", [frame(b"q", b"\x80"), frame(b"a", b"wrong"), b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 9])
async def test_without_the_token_a_connection_gets_nothing(tmp_path: Path, said: bytes):
    async with serving(tmp_path, tcp=True) as (address, _, source):
        reader, writer = await asyncio.open_connection(address.host, address.port)
        head, body = leased(call(chunks=["a"])).encode()
        writer.write(said + frame(link.REQUEST, head) + frame(link.BODY, body))
        with contextlib.suppress(ConnectionError):
            assert await asyncio.wait_for(reader.read(), 5) == b""
        writer.close()
        assert source.asked == []


@pytest.mark.parametrize("said", [frame(b"q", b"\xc1") + frame(b"b", b""), frame(b"q", b"\x80") + frame(b"b", b"{}")])
async def test_a_request_that_is_none_ends_its_connection_only(tmp_path: Path, said: bytes):
    async with serving(tmp_path) as (address, links, _):
        reader, writer = await asyncio.open_unix_connection(address.unix)
        writer.write(said)
        assert await asyncio.wait_for(reader.read(), 5) == b""
        writer.close()
        assert (await read(await links.call(address, leased(call(chunks=["a"])))))[1] == [b"a"]


def test_a_folder_that_is_open_or_not_ours_is_refused(tmp_path: Path):
    folder = make_private(tmp_path / "pool")
    os.chmod(folder, 0o755)
    with pytest.raises(PermissionError):
        check_private(folder)
    (tmp_path / "link").symlink_to(make_private(tmp_path / "real"))
    with pytest.raises(PermissionError):
        make_private(tmp_path / "link")


STRANGER = """
import os, socket, sys
os.setgid(65534); os.setuid(65534)
with socket.socket(socket.AF_UNIX) as stranger:
    stranger.settimeout(5)
    try:
        stranger.connect(sys.argv[1])
        stranger.sendall(bytes.fromhex(sys.argv[2]))
        print(stranger.recv(100))
    except (ConnectionResetError, BrokenPipeError):
        print(b"")
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
async def test_another_user_gets_nothing_even_where_the_folder_lets_him_in(tmp_path: Path):
    async with serving(tmp_path) as (address, _, source):
        folder = Path(address.unix).parent
        for each in (*reversed(folder.parents), folder):
            if each.is_relative_to(tmp_path.parent.parent):
                each.chmod(0o711)
        os.chmod(address.unix, 0o666)
        head, body = leased(call(chunks=["a"])).encode()
        said = (frame(link.REQUEST, head) + frame(link.BODY, body)).hex()
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", STRANGER, address.unix, said, stdout=subprocess.PIPE
        )
        output, _ = await process.communicate()
        assert output.strip() == b"b''"
        assert source.asked == []


IMPOSTOR = """
import os, socket, sys
os.setgid(65534); os.setuid(65534)
with socket.socket(socket.AF_UNIX) as listener:
    listener.bind(sys.argv[1]); listener.listen()
    os.chmod(sys.argv[1], 0o777)
    print("listens", flush=True)
    print(listener.accept()[0].recv(100), flush=True)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
async def test_a_replaced_socket_is_told_nothing(tmp_path: Path):
    open_folder, folder = tmp_path / "open", make_private(tmp_path / "pool")
    open_folder.mkdir()
    open_folder.chmod(0o777)
    for each in (tmp_path.parent.parent, tmp_path.parent, tmp_path):
        each.chmod(0o711)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", IMPOSTOR, str(open_folder / "s"), stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert await process.stdout.readline() == b"listens\n"
    os.rename(open_folder / "s", folder / "s")
    with pytest.raises(ConnectionEnded, match="another user"):
        await Links("here").call(Address("here", str(folder / "s")), leased(call()))
    assert await process.stdout.readline() == b"b''\n"
    await process.wait()
