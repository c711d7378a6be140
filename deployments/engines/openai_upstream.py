"""Requests that run on an external OpenAI-compatible server: bytes in, bytes out.

The body goes as it came, with the fields beside it that keep the server from unloading the model in between; the
answer comes as it was sent, whole events at a time (`upstream_bytes.py`), and no faster than it is read. Nothing that
a server sends is taken without a bound. Whatever goes wrong is one of the contract's errors, and none of them holds the
server's key.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import replace
from typing import Any

import httpx

from cluster.config import ServerEntry
from cluster.errors import BackendTimeout, BackendUnavailable, PoolError, RateLimited, ReplicaGone
from cluster.servers.types import base_url, hold_fields
from deployments.engines.protocol import EVENT_STREAM, JSON, Call, Reply, Report
from deployments.engines.upstream_bytes import EventSplitter, Unreadable, UsageReader, one_body
from deployments.schemas import CHAT

#: A server on a network answers a connection within this time, in seconds, or is taken to be away.
CONNECT_S = 5.0
#: How much of a refusal's body is read, and how much of its message is passed on, in characters.
MAX_REFUSAL, MAX_MESSAGE = 65_536, 500
#: Headers that are about one connection, and not passed on with a raw answer.
UNPASSED = {
    "connection",
    "keep-alive",
    "transfer-encoding",
    "content-length",
    "upgrade",
    "trailer",
    "te",
    "date",
    "server",
}
#: An answer's headers; the HTTP library itself bounds their bytes, at 100 KiB together.
MAX_HEADERS = 100


class Upstreams:
    """All external servers, as the requests of one process call them."""

    def __init__(self) -> None:
        # A connection for each request: one that is kept may be closed by the server in the moment of its next use,
        # which could not be told from a server that died.
        self._client = httpx.AsyncClient(
            timeout=httpx.Timeout(None, connect=CONNECT_S),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
        )

    async def call(self, server: ServerEntry, call: Call, keep_alive_s: float, timeout_s: float) -> Reply:
        """The server's answer to one leased call, once it has said that there is one; its chunks must be closed.

        Raises `ReplicaGone` when the server cannot be reached or is lost, `BackendTimeout` after `timeout_s`, and the
        upstream errors of CONTRACT section 6 for what it refuses; the chunks raise them, too.
        """
        report = Report()
        head: dict[str, Any] = {"status": 200, "headers": dict(EVENT_STREAM if call.stream else JSON)}
        deadline = asyncio.get_running_loop().time() + timeout_s
        chunks = self._answer(server, call, keep_alive_s, deadline, report, head)
        try:
            # The first item only says that the server has accepted. From here on closing the chunks ends the request.
            await anext(chunks)
        except BackendUnavailable as refusal:
            unbounded = _without_bound(call)
            if refusal.code != "upstream_invalid_request" or unbounded is None:
                raise
            # It may want to know room for all the tokens of the bound; without one it takes what fits.
            chunks = self._answer(server, unbounded, keep_alive_s, deadline, report, head)
            await anext(chunks)
        return Reply(head["status"], head["headers"], chunks, report)

    async def _answer(
        self,
        server: ServerEntry,
        call: Call,
        keep_alive_s: float,
        deadline: float,
        report: Report,
        head: dict[str, Any],
    ) -> AsyncGenerator[bytes, None]:
        """An empty item once the server has accepted, and then its answer; that of a raw call has its own `head`."""
        started = time.perf_counter()
        key = _key(server)
        is_raw = isinstance(call.body, bytes)
        request = self._client.build_request(
            call.method,
            base_url(server.url) + call.path + (f"?{call.query}" if call.query else ""),
            content=call.body if isinstance(call.body, bytes) else _content(server, call.body, keep_alive_s),
            headers=_headers(call, key),
        )
        usage = UsageReader()
        try:
            async with asyncio.timeout_at(deadline):
                answer = await self._client.send(request, stream=True)
            try:
                async with asyncio.timeout_at(deadline):
                    await _check_head(server, call, answer, key)
                if is_raw:
                    passed = {name: value for name, value in answer.headers.items() if name not in UNPASSED}
                    head |= {"status": answer.status_code, "headers": passed}
                yield b""
                if is_raw:
                    parts = _timed(answer, deadline)
                else:
                    parts = _stream(answer, deadline, usage) if call.stream else _whole(answer, deadline, usage)
                async with contextlib.aclosing(parts):
                    async for part in parts:
                        if report.ttft_ms is None and call.stream:
                            report.ttft_ms = (time.perf_counter() - started) * 1e3
                        yield part
            finally:
                await answer.aclose()
                usage.fill(report)
                report.total_ms = (time.perf_counter() - started) * 1e3
        except Unreadable as error:
            raise _unreadable(str(error)) from None
        except TimeoutError:
            raise BackendTimeout("the request ran longer than it may", phase="running") from None
        except (httpx.ConnectError, httpx.ConnectTimeout):
            raise _gone(f"the server {server.url} cannot be reached") from None
        except httpx.TimeoutException:
            raise BackendTimeout(
                f"the server {server.url} did not answer in time", code="upstream_timeout", phase="running"
            ) from None
        except httpx.TransportError:
            raise _gone(f"the connection to the server {server.url} was lost") from None


def _without_bound(call: Call) -> Call | None:
    """A chat without the tokens that it asks for, where they are a bound and no wish; None where they are not."""
    body = call.body
    if isinstance(body, bytes) or call.path != CHAT or not body.get("clamp_max_tokens") or not body.get("max_tokens"):
        return None
    return replace(call, body={name: value for name, value in body.items() if name != "max_tokens"})


def _content(server: ServerEntry, body: dict[str, Any], keep_alive_s: float) -> bytes:
    """The body for a server: without what only the pool's own engines know, which strict servers would refuse."""
    kept = {name: value for name, value in body.items() if name != "clamp_max_tokens"}
    return json.dumps({**kept, **hold_fields(server.server_type, keep_alive_s)}).encode()


def _key(server: ServerEntry) -> str | None:
    if server.api_key_env is None:
        return None
    key = os.environ.get(server.api_key_env)
    if not key:
        raise PoolError(
            f"the environment variable {server.api_key_env} for the server {server.url} is not set",
            code="missing_api_key_env",
        )
    return key


def _headers(call: Call, key: str | None) -> dict[str, str]:
    headers = dict(call.headers)
    if not isinstance(call.body, bytes):
        kind = "text/event-stream" if call.stream else "application/json"
        headers = {"content-type": "application/json", "accept": kind}
    # The bytes are passed on as they come, so they must not be compressed.
    headers |= {"accept-encoding": "identity", "x-request-id": call.request_id}
    if key is not None:
        headers["authorization"] = f"Bearer {key}"
    return headers


async def _check_head(server: ServerEntry, call: Call, answer: httpx.Response, key: str | None) -> None:
    """Raise what a refusal means, or `Unreadable` where the head announces something that was not asked for.

    A raw call gets whatever the server says, but for what is between the pool and its server.
    """
    is_raw = isinstance(call.body, bytes)
    if answer.status_code != 200 and (not is_raw or answer.status_code in (401, 403)):
        raise await _refusal(server, answer, key)
    if len(answer.headers.raw) > MAX_HEADERS:
        raise Unreadable(f"it sent more than {MAX_HEADERS} headers")
    if answer.headers.get("content-encoding", "identity") != "identity":
        raise Unreadable("its answer is compressed, which was not asked for")
    kind = answer.headers.get("content-type", "")[:MAX_MESSAGE]
    if call.stream and not kind.startswith("text/event-stream"):
        raise Unreadable(f"a stream was asked for, and {kind or 'something without a type'} came")


async def _timed(answer: httpx.Response, deadline: float) -> AsyncGenerator[bytes, None]:
    """The raw parts of an answer. Raises `TimeoutError` at the deadline; time that the reader takes counts as well."""
    parts: AsyncIterator[bytes] = answer.aiter_raw()
    while True:
        # Around each read and never around a `yield`, where it would cancel whoever reads.
        async with asyncio.timeout_at(deadline):
            part = await anext(parts, None)
        if part is None:
            return
        yield part


async def _stream(answer: httpx.Response, deadline: float, usage: UsageReader) -> AsyncGenerator[bytes, None]:
    """The stream's events, never half of one: if the server is lost, an error event can follow what was sent."""
    splitter = EventSplitter()
    async for part in _timed(answer, deadline):
        if events := splitter.push(part):
            usage.look_at(events)
            yield events
    if rest := splitter.finish():
        usage.look_at(rest)
        yield rest


async def _whole(answer: httpx.Response, deadline: float, usage: UsageReader) -> AsyncGenerator[bytes, None]:
    body, parsed = await one_body(_timed(answer, deadline))
    usage.found = parsed.get("usage")
    yield body


async def _refusal(server: ServerEntry, answer: httpx.Response, key: str | None) -> PoolError:
    """What a status other than 200 means for the client, with the server's own words."""
    body = b""
    async for part in answer.aiter_raw():
        body += part
        if len(body) > MAX_REFUSAL:
            break
    status = answer.status_code
    message = f"the server {server.url} answered {status}: {_words(body)}"
    if key is not None:
        message = message.replace(key, "***")
    if status in (401, 403):
        return BackendUnavailable(message, status=502, code="upstream_authentication_failure")
    if status == 429:
        return RateLimited(message, code="upstream_rate_limit", retry_after=_retry_after(answer))
    if status in (408, 504):
        return BackendTimeout(message, code="upstream_timeout", phase="running")
    if 400 <= status < 500:
        return BackendUnavailable(message, status=502, code="upstream_invalid_request")
    return BackendUnavailable(message, status=502, code="upstream_server_error")


def _words(body: bytes) -> str:
    """The message in an error body of whatever shape."""
    try:
        error: Any = json.loads(body)
    except (ValueError, RecursionError):
        error = None
    for key in ("error", "detail", "message"):
        if isinstance(error, dict):
            error = error.get(key, error)
    text = error if isinstance(error, str) else body.decode(errors="replace")
    return text.strip()[:MAX_MESSAGE] or "nothing more"


def _retry_after(answer: httpx.Response) -> float:
    value = answer.headers.get("retry-after", "")
    return max(1.0, float(value)) if value.isdigit() else 1.0


def _gone(message: str) -> ReplicaGone:
    return ReplicaGone(message, status=502, code="upstream_connection_error")


def _unreadable(message: str) -> PoolError:
    return BackendUnavailable(
        f"the server cannot be understood: {message}", status=502, code="upstream_response_parse_failure"
    )
