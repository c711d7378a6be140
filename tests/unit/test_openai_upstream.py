"""Requests to external servers over real HTTP: bytes through, faults translated, keys kept."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import ServerEntry
from cluster.errors import PoolError, ReplicaGone
from deployments.engines.openai_upstream import Target, Upstreams
from deployments.engines.protocol import Call, Report
from deployments.engines.upstream_answers import Answer
from deployments.engines.upstream_bytes import EventSplitter
from deployments.engines.upstream_errors import Blame
from tests.upstream import Upstream

CHAT = "/v1/chat/completions"


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    with Upstream("m").listening() as upstream:
        yield upstream


def call(stream: bool = False, **fields: Any) -> Call:
    messages = [{"role": "user", "content": "hi"}]
    return Call(CHAT, {"model": "m", "messages": messages, "stream": stream, **fields}, "req-1")


async def read(upstream: Upstream, asked: Call, timeout_s: float = 10.0, **entry: Any) -> list[bytes]:
    server = ServerEntry(url=upstream.url, **entry)
    chunks = []
    async with contextlib.aclosing(
        (await Upstreams().call(Target.of(server, 300.0), asked, timeout_s)).chunks
    ) as answer:
        async for chunk in answer:
            chunks.append(chunk)
    return chunks


def words(data: bytes) -> str:
    events = [event[6:] for event in data.split(b"\n\n") if event.startswith(b"data: {")]
    return "".join(json.loads(event)["choices"][0]["delta"]["content"] for event in events)


async def test_a_body_and_a_stream_go_through(upstream):
    (body,) = await read(upstream, call(temperature=0.5))
    assert json.loads(body)["choices"][0]["message"]["content"] == "m:0 m:1 m:2 m:3 m:4 "
    assert upstream.bodies == [call(temperature=0.5).body]
    await read(upstream, call(clamp_max_tokens=True))
    assert "clamp_max_tokens" not in upstream.bodies[1]
    data = b"".join(await read(upstream, call(stream=True)))
    assert words(data) == "m:0 m:1 m:2 m:3 m:4 "
    assert data.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_bound_that_leaves_the_prompt_no_room_is_no_reason_to_be_refused(upstream, stream):
    """vLLM and SGLang refuse what they could not give in full, and the clients of Messages always ask for very much."""
    upstream.most_tokens = 100
    await read(upstream, call(stream, max_tokens=32_000, clamp_max_tokens=True))
    assert [body.get("max_tokens") for body in upstream.bodies] == [32_000, None]
    await read(upstream, call(stream, max_tokens=90, clamp_max_tokens=True))
    assert len(upstream.bodies) == 3
    with pytest.raises(PoolError, match="upstream says 400"):
        await read(upstream, call(stream, max_tokens=32_000))
    assert len(upstream.bodies) == 4, "who counts on all of them is told"


async def test_events_leave_as_they_come(upstream):
    upstream.gap_s = 0.1
    chunks = await read(upstream, call(stream=True))
    assert len(chunks) >= upstream.tokens
    assert all(chunk.endswith(b"\n\n") for chunk in chunks)


@contextlib.asynccontextmanager
async def closing_server() -> AsyncIterator[tuple[str, list[int]]]:
    """A server that closes a connection behind the first answer on it, which the next request there meets. Its URL, and
    how many requests each connection has brought."""
    seen: list[int] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = len(seen)
        seen.append(0)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError), contextlib.closing(writer):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                await reader.readexactly(int(head.partition(b"content-length:")[2].split(b"\r\n")[0]))
                seen[number] += 1
                if seen[number] > 1:
                    return
                body = b'{"choices": []}'
                sizes = b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
                writer.write(b"HTTP/1.1 200 OK\r\n" + sizes + body)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", seen


@pytest.mark.parametrize("is_retried", [True, False])
async def test_a_kept_connection_that_was_closed_is_no_lost_server(is_retried: bool):
    """Where a request may be sent again, that is: a remote API gets it once."""
    upstreams = Upstreams(is_local=True)
    async with closing_server() as (url, seen):
        target = Target(url, Blame("the server", is_retried=is_retried))

        async def asked() -> list[bytes]:
            async with contextlib.aclosing((await upstreams.call(target, call())).chunks) as chunks:
                return [chunk async for chunk in chunks]

        assert await asked()
        if is_retried:
            assert await asked()
            assert seen == [2, 1]
        else:
            with pytest.raises(PoolError) as lost:
                await asked()
            assert (lost.value.code, seen) == ("upstream_connection_error", [2])
        await upstreams.close()


@pytest.mark.parametrize(("kind", "field"), [("ollama", "keep_alive"), ("lmstudio", "ttl")])
async def test_a_server_is_told_to_keep_its_model(upstream, kind, field):
    await read(upstream, call(), server_type=kind)
    assert upstream.bodies[0][field] == 300


async def test_closing_the_answer_ends_the_request_upstream(upstream):
    upstream.gap_s = 0.05
    upstream.tokens = 1000
    server = ServerEntry(url=upstream.url)
    async with contextlib.aclosing(
        (await Upstreams().call(Target.of(server, 300.0), call(stream=True), 60.0)).chunks
    ) as answer:
        assert await anext(answer)
    async with asyncio.timeout(5):
        while not upstream.aborted or +upstream.running:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        (400, 502, "upstream_invalid_request"),
        (401, 502, "upstream_authentication_failure"),
        (403, 502, "upstream_authentication_failure"),
        (404, 502, "upstream_invalid_request"),
        (408, 504, "upstream_timeout"),
        (429, 429, "upstream_rate_limit"),
        (500, 502, "upstream_server_error"),
        (503, 502, "upstream_server_error"),
        ("garbage", 502, "upstream_response_parse_failure"),
    ],
)
async def test_what_a_server_refuses_has_its_code(upstream, fault, status, code, stream):
    upstream.fault = fault
    with pytest.raises(PoolError) as caught:
        await read(upstream, call(stream))
    assert (caught.value.status, caught.value.code) == (status, code)
    if isinstance(fault, int):
        assert f"upstream says {fault}" in caught.value.message
    assert not isinstance(caught.value, ReplicaGone)


async def test_a_key_goes_to_the_server_and_nowhere_else(upstream, monkeypatch):
    with pytest.raises(PoolError) as caught:
        await read(upstream, call(), api_key_env="UPSTREAM_KEY")
    assert (caught.value.status, caught.value.code) == (500, "missing_api_key_env")
    monkeypatch.setenv("UPSTREAM_KEY", "says")
    await read(upstream, call(), api_key_env="UPSTREAM_KEY")
    assert upstream.keys == ["Bearer says"]
    upstream.fault = 401
    with pytest.raises(PoolError, match=r"upstream \*\*\* 401"):
        await read(upstream, call(), api_key_env="UPSTREAM_KEY")


async def test_a_server_that_is_away_or_lost_is_gone_like_a_replica(upstream):
    upstream.fault = "cut"
    seen = []
    server = ServerEntry(url=upstream.url)
    with pytest.raises(ReplicaGone) as caught:
        async with contextlib.aclosing(
            (await Upstreams().call(Target.of(server, 300.0), call(stream=True), 10.0)).chunks
        ) as answer:
            async for chunk in answer:
                seen.append(chunk)
    assert (caught.value.status, caught.value.code) == (502, "upstream_connection_error")
    # Half an event was sent; only whole ones arrived.
    assert words(b"".join(seen)) == "m:0 m:1 "
    assert b"".join(seen).endswith(b"\n\n")
    away = Upstream()
    with away.listening():
        pass
    with pytest.raises(ReplicaGone):
        await read(away, call())


@pytest.mark.parametrize("fault", ["deaf", "hang"])
async def test_a_server_that_hangs_ends_at_the_requests_deadline(upstream, fault):
    upstream.fault = fault
    with pytest.raises(PoolError) as caught:
        await read(upstream, call(stream=True), timeout_s=0.3)
    assert (caught.value.status, caught.value.extras) == (504, {"phase": "running"})
    async with asyncio.timeout(5):
        while not upstream.aborted:
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def scripted(answers: list[bytes | list[bytes]]) -> AsyncIterator[Upstream]:
    """A server that sends one of the answers to each connection, byte for byte; a list is sent in pieces."""
    writers: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        answer = answers.pop(0)
        with contextlib.suppress(ConnectionError):
            for piece in [answer] if isinstance(answer, bytes) else answer:
                writer.write(piece)
                await writer.drain()
        writer.close()
        writers.append(writer)

    listener = await asyncio.start_server(serve, "127.0.0.1", 0)
    plain = Upstream()
    plain.port = listener.sockets[0].getsockname()[1]
    async with listener:
        yield plain


OK = b"HTTP/1.1 200 OK\r\nConnection: close\r\n"
STREAM = OK + b"Content-Type: text/event-stream\r\n\r\n"


async def test_what_a_server_sends_has_bounds():
    mib = b"x" * (1 << 20)
    answers = [
        [STREAM, b"data: ", mib, mib],
        [OK + b"\r\n", b'{"x":"', *[mib] * 65],
        [OK + b"".join(b"X-%d: y\r\n" % n for n in range(200)) + b"\r\n", b"{}"],
        [OK + b"X: " + mib + b"\r\n\r\n", b"{}"],
        [OK + b"Content-Encoding: gzip\r\n\r\n", b"{}"],
    ]
    async with scripted(answers) as plain:
        for message, stream in (
            ("an event is larger than 1 MiB", True),
            ("larger than 64 MiB", False),
            ("more than 100 headers", False),
            ("connection to the server .* was lost", False),
            ("compressed", False),
        ):
            with pytest.raises(PoolError, match=message) as caught:
                await read(plain, call(stream))
            assert caught.value.status == 502


async def test_a_large_event_is_no_mistake():
    event = b"data: " + b"x" * ((1 << 20) - 100) + b"\n\n"
    done = b"data: [DONE]\n\n"
    async with scripted([[STREAM, event, event, done]]) as plain:
        assert b"".join(await read(plain, call(stream=True))) == 2 * event + done


async def test_a_stream_that_ends_without_an_end_was_lost():
    said = [b'data: {"choices":[{"delta":{"content":"a"},"finish_reason":null}]}\n\n', b'data: {"error":"no"}\n\n']
    async with scripted([[STREAM, said[0]], [STREAM, *said]]) as plain:
        with pytest.raises(ReplicaGone, match="was lost"):
            await read(plain, call(stream=True))
        assert b"".join(await read(plain, call(stream=True))) == b"".join(said)


async def test_the_report_has_the_servers_own_usage():
    usage = b'"usage": {"prompt_tokens": 7, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 3}}'
    events = b'data: {"choices":[],"usage":null}\n\ndata: {"choices":[], %s}\n\ndata: [DONE]\n\n' % usage
    nonsense = b'{"usage": {"prompt_tokens": "x"}}'
    answers = [[STREAM, events], [OK + b"\r\n", b"{%s}" % usage], [OK + b"\r\n", nonsense]]
    reports = []
    async with scripted(answers) as plain:
        for stream in (True, False, False):
            reply = await Upstreams().call(Target.of(ServerEntry(url=plain.url), 300.0), call(stream), 10.0)
            assert b"".join([chunk async for chunk in reply.chunks])
            reports.append(reply.report)
    for report in reports[:2]:
        assert (report.prompt_tokens, report.output_tokens, report.cached_tokens) == (7, 5, 3)
        assert report.total_ms is not None
    assert reports[0].ttft_ms is not None
    assert reports[2].prompt_tokens is None


async def test_a_reader_that_does_not_read_holds_the_server_back():
    event = b"data: " + b"x" * 65_536 + b"\n\n"
    sent = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await reader.readuntil(b"\r\n\r\n")
        writer.write(STREAM)
        with contextlib.suppress(ConnectionError):
            while True:
                writer.write(event)
                await writer.drain()
                sent += len(event)
        writer.close()

    listener = await asyncio.start_server(serve, "127.0.0.1", 0)
    plain = Upstream()
    plain.port = listener.sockets[0].getsockname()[1]
    async with listener:
        reply = await Upstreams().call(Target.of(ServerEntry(url=plain.url), 300.0), call(stream=True), 60.0)
        await anext(reply.chunks)
        before = -1
        while before != sent:
            before = sent
            await asyncio.sleep(0.2)
        assert sent < 64 << 20, "what the sockets hold, and no more"
        await reply.chunks.aclose()


EVENTS = b"".join(b'data: {"n":%d}\n\n' % n for n in range(4)) + b": comment\n\ndata: a\ndata: b\n\n"


@given(
    st.sampled_from([b"\n", b"\r\n", b"\r"]),
    st.lists(st.integers(0, len(EVENTS) + 12), max_size=12),
)
def test_every_kind_of_line_end_at_every_cut(line_end: bytes, cuts: list[int]) -> None:
    raw = EVENTS.replace(b"\n", line_end)
    marks = [0, *sorted(min(cut, len(raw)) for cut in cuts), len(raw)]
    splitter = EventSplitter()
    pieces = [splitter.push(raw[a:b]) for a, b in itertools.pairwise(marks)]
    assert all(piece.endswith(b"\n\n") for piece in pieces if piece), "never half an event"
    assert b"".join(pieces) + splitter.finish() == EVENTS


async def test_odd_but_legal_answers():
    """CRLF between events, no blank line at the end, an error without JSON."""
    answers = [
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\ndata: {}\r\n\r\ndata: [DONE]",
        b"HTTP/1.1 429 Slow\r\nRetry-After: 7\r\nConnection: close\r\n\r\nslow down",
        b"HTTP/1.1 500 Bad\r\nConnection: close\r\n\r\n" + b"x" * 100_000,
        b"HTTP/1.1 500 Bad\r\nConnection: close\r\n\r\n",
    ]

    async with scripted(answers) as plain:
        data = b"".join(await read(plain, call(stream=True)))
        assert data == b"data: {}\n\ndata: [DONE]\n\n"
        with pytest.raises(PoolError, match="slow down") as caught:
            await read(plain, call())
        assert caught.value.retry_after == 7.0
        with pytest.raises(PoolError, match=r"x{500}$"):
            await read(plain, call())
        with pytest.raises(PoolError, match="nothing more"):
            await read(plain, call())


def chunk(said: dict[str, Any] | None, finish: str | None = None, **more: Any) -> bytes:
    choices = [] if said is None else [{"index": 0, "delta": said, "finish_reason": finish}]
    return b"data: " + json.dumps({"model": "theirs", "choices": choices, **more}).encode() + b"\n\n"


USAGE = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}
TEXT, LAST, COUNTS = chunk({"content": "a"}), chunk({}, "stop"), chunk(None, usage=USAGE)
DONE = b"data: [DONE]\n\n"


def answered(*parts: bytes, shows_usage: bool = False, renamed: bool = False) -> tuple[list[dict[str, Any]], Report]:
    """The chunks that a client gets of a server's stream, and the report."""
    options = {"stream_options": {"include_usage": True}} if shows_usage else {}
    report = Report()
    answer = Answer(call(stream=True, **options), report, renamed=renamed)
    given = b"".join([*map(answer.events, parts), answer.finish()])
    events = [event.removeprefix(b"data: ") for event in given.split(b"\n\n") if event]
    return [json.loads(event) for event in events if event != b"[DONE]"], report


@pytest.mark.parametrize("is_cut", [False, True], ids=["together", "apart"])
@pytest.mark.parametrize("ends", [DONE, b""], ids=["done", "nothing"])
def test_the_final_chunk_of_a_stream_carries_metrics(is_cut: bool, ends: bytes):
    parts = [TEXT, LAST, COUNTS, ends]
    chunks, report = answered(*(parts if is_cut else [b"".join(parts)]))
    # What was not asked for is counted and not shown.
    assert [each["choices"][0]["finish_reason"] for each in chunks] == [None, "stop"]
    assert all(each.get("usage") is None for each in chunks)
    assert "metrics" not in chunks[0]
    metrics = chunks[1]["metrics"]
    assert (metrics["engine_prompt_tokens"], metrics["engine_output_tokens"]) == (7, 5)
    assert metrics["pool_total_wall_ms"] >= metrics["engine_total_wall_ms"] >= metrics["backend_inference_wall_ms"] > 0
    assert (report.prompt_tokens, report.output_tokens) == (7, 5)


def test_counts_that_were_asked_for_are_the_final_chunk():
    chunks, _ = answered(TEXT, LAST, COUNTS + DONE, shows_usage=True)
    assert [bool(each["choices"]) for each in chunks] == [True, True, False]
    assert chunks[2]["usage"] == USAGE
    assert [("metrics" in each) for each in chunks] == [False, False, True]


def test_counts_beside_the_last_choice_and_several_choices():
    other = LAST.replace(b'"index": 0', b'"index": 1')
    chunks, report = answered(
        TEXT, LAST, other.replace(b'"choices"', b'"usage": %s, "choices"' % json.dumps(USAGE).encode()), DONE
    )
    assert [each["choices"][0]["index"] for each in chunks] == [0, 0, 1]
    assert [("metrics" in each, "usage" in each) for each in chunks] == [(False, False), (False, False), (True, False)]
    assert report.output_tokens == 5


def test_a_client_sees_the_model_that_it_asked_for():
    said = chunk({"content": '"model": "theirs" \\"model\\":'})
    chunks, _ = answered(said, TEXT, LAST, DONE, renamed=True)
    assert {each["model"] for each in chunks} == {"m"}
    assert chunks[0]["choices"][0]["delta"]["content"] == '"model": "theirs" \\"model\\":'


def test_what_cannot_be_understood_near_the_end_is_passed_on():
    raw = (
        b'data: {"finish_reason": "stop", broken\n\n: "usage": {\n\ndata: {"error": {"message": "x", "usage": {}}}\n\n'
    )
    report = Report()
    answer = Answer(call(stream=True), report, renamed=False)
    assert answer.events(LAST) == b""
    assert answer.events(raw) == LAST + raw
    assert answer.finish() == b""


async def test_a_stream_always_counts_and_a_body_carries_metrics(upstream):
    await read(upstream, call(stream=True))
    assert upstream.bodies[0]["stream_options"] == {"include_usage": True}
    (body,) = await read(upstream, call())
    assert json.loads(body)["metrics"]["engine_total_wall_ms"] > 0


async def test_connections_are_kept_for_a_moment_and_a_dead_server_is_seen():
    upstream, upstreams = Upstream("m"), Upstreams()
    with upstream.listening():
        target = Target.of(ServerEntry(url=upstream.url), 300.0)
        for stream in (True, False, True):
            reply = await upstreams.call(target, call(stream), 10.0)
            assert b"".join([part async for part in reply.chunks])
        assert len(upstream.clients) == 1
    with pytest.raises(ReplicaGone, match="cannot be reached"):
        await upstreams.call(target, call(), 10.0)
    # Back on the same port, with none of the old connections.
    with upstream.listening():
        await (await upstreams.call(target, call(), 10.0)).chunks.aclose()
    await upstreams.close()


@pytest.mark.parametrize(("retries", "attempts"), [(0, 1), (2, 3)])
async def test_a_call_is_made_once_unless_told_otherwise(upstream, monkeypatch, retries: int, attempts: int):
    monkeypatch.setattr("deployments.engines.openai_upstream.RETRY_S", 0.01)
    target = Target(upstream.url, Blame("it", is_retried=False), retries=retries)
    upstream.fault = 500
    with pytest.raises(PoolError, match="it answered 500"):
        await Upstreams().call(target, call(), 10.0)
    assert len(upstream.bodies) == attempts
    upstream.fault = 400
    with pytest.raises(PoolError):
        await Upstreams().call(target, call(), 10.0)
    assert len(upstream.bodies) == attempts + 1, "what is wrong stays wrong"


async def test_the_pools_own_server_is_believed_about_a_request():
    errors = [
        b'{"error":{"code":400,"message":"bad grammar","type":"invalid_request_error","param":"grammar"}}',
        b'{"error":{"code":400,"message":"too long","type":"exceed_context_size_error"}}',
        b'{"object":"error","message":"maximum context length is 5","code":400}',
    ]
    refused = b"HTTP/1.1 400 Bad\r\nConnection: close\r\n\r\n"
    async with scripted([refused + error for error in errors]) as plain:
        seen = []
        for _ in errors:
            with pytest.raises(PoolError) as caught:
                await Upstreams().call(Target(plain.url, Blame("it", is_ours=True)), call(), 10.0)
            seen.append((caught.value.status, caught.value.code, caught.value.param))
    assert seen == [(400, "INVALID_REQUEST", "grammar"), *[(400, "context_length_exceeded", "messages")] * 2]
