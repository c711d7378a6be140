"""Requests that run on a server with an OpenAI interface: an external one, one that the pool started, a remote API.

The body goes as it came, but for the fields that the pool lays over it; the answer comes as it was sent, whole events
at a time (`upstream_bytes.py`, `upstream_answers.py`), and no faster than it is read. Nothing that a server sends is
taken without a bound. Whatever goes wrong is one of the contract's errors, and none of them holds the server's key.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import httpx

from cluster.config import ServerEntry
from cluster.errors import BackendTimeout, BackendUnavailable, InvalidRequest, PoolError, RateLimited
from cluster.servers.types import base_url, hold_fields
from deployments.engines.protocol import EVENT_STREAM, JSON, Call, Reply, Report
from deployments.engines.upstream_answers import Answer, is_generation
from deployments.engines.upstream_bytes import EventSplitter, Unreadable, one_body
from deployments.engines.upstream_errors import MAX_MESSAGE, Blame
from deployments.schemas import CHAT

#: A server on a network answers a connection within this time, in seconds, or is taken to be away.
CONNECT_S = 5.0
#: For so long a connection is kept for the next request, in seconds: servers close theirs after 5 (uvicorn, llama.cpp)
#: or later, and one that is closed in the moment of its next use could not be told from a server that died.
KEPT_S = 4.0
#: So many kept connections at most may turn out to be closed before a new one is made.
STALE = 4
#: Between two attempts at least, in seconds; it doubles.
RETRY_S = 0.5
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


@dataclass(frozen=True, slots=True)
class Target:
    """One server as a request calls it.

    `root` is its URL before any path; `api` stands for `/v1` where that is another one. `model` is what it calls the
    model where that is not what the call does, `fields` are laid over the body. It may be silent for `silence_s`. A
    call that brought nothing of an answer is made `retries` times more.
    """

    root: str
    blame: Blame
    api: str | None = None
    model: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    silence_s: float | None = None
    retries: int = 0

    @classmethod
    def of(cls, server: ServerEntry, keep_alive_s: float) -> Target:
        """An external server, which is to keep the model for so long. Raises `missing_api_key_env`."""
        blame = Blame(f"the server {server.url}", key_of(server.api_key_env, f"the server {server.url}"))
        return cls(base_url(server.url), blame, fields=hold_fields(server.server_type, keep_alive_s))

    def url(self, call: Call) -> str:
        """Where a call goes."""
        is_api = self.api is not None and call.path.startswith("/v1/")
        where = f"{self.api}{call.path.removeprefix('/v1')}" if is_api else self.root + call.path
        return where + (f"?{call.query}" if call.query else "")

    def content(self, call: Call) -> bytes:
        """The body as the server gets it: without what only the pool's own engines know, which others may refuse."""
        if isinstance(call.body, bytes):
            return call.body
        body = {name: value for name, value in call.body.items() if name != "clamp_max_tokens"}
        if self.model is not None:
            body["model"] = self.model
        if call.stream and is_generation(call):
            # The pool counts tokens itself, also those that the client does not ask for.
            body["stream_options"] = {**(body.get("stream_options") or {}), "include_usage": True}
        return json.dumps({**body, **self.fields}).encode()


def key_of(variable: str | None, whose: str) -> str | None:
    """The key in an environment variable; None where none is needed. Raises `missing_api_key_env`."""
    if variable is None:
        return None
    key = os.environ.get(variable)
    if not key:
        message = f"the environment variable {variable} for {whose} is not set"
        raise PoolError(message, code="missing_api_key_env")
    return key


class Upstreams:
    """The servers that the requests of one process call, over connections that are kept for a moment."""

    def __init__(self, *, is_local: bool = False) -> None:
        """`is_local`: on this machine, where no proxy of the environment may stand in between."""
        self._client = httpx.AsyncClient(
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=KEPT_S),
            trust_env=not is_local,
        )

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    async def call(self, target: Target, call: Call, timeout_s: float | None = None) -> Reply:
        """The server's answer to one leased call, once it has said that there is one; its chunks must be closed.

        Raises `ReplicaGone` when the server cannot be reached or is lost (or `BackendUnavailable`, by its `blame`),
        `BackendTimeout` after `timeout_s`, and the upstream errors of CONTRACT section 6 for what it refuses; the
        chunks raise them, too.
        """
        deadline = None if timeout_s is None else asyncio.get_running_loop().time() + timeout_s
        pause_s = RETRY_S
        for left in range(target.retries, -1, -1):
            try:
                return await self._attempt(target, call, deadline)
            except (BackendUnavailable, BackendTimeout, RateLimited) as error:
                if not left or not _may_pass(error):
                    raise
                await asyncio.sleep(max(pause_s, error.retry_after or 0.0))
                pause_s *= 2
        raise AssertionError("the last attempt has returned or raised")

    async def _attempt(self, target: Target, call: Call, deadline: float | None) -> Reply:
        report = Report()
        head: dict[str, Any] = {"status": 200, "headers": dict(EVENT_STREAM if call.stream else JSON)}
        chunks = self._answer(target, call, deadline, report, head)
        try:
            # The first item only says that the server has accepted. From here on closing the chunks ends the request.
            await anext(chunks)
        except (BackendUnavailable, InvalidRequest) as refusal:
            unbounded = _without_bound(call)
            if not _is_refused(refusal) or unbounded is None or not target.blame.is_retried:
                raise
            # It may want to know room for all the tokens of the bound; without one it takes what fits.
            chunks = self._answer(target, unbounded, deadline, report, head)
            await anext(chunks)
        return Reply(head["status"], head["headers"], chunks, report)

    async def _answer(
        self, target: Target, call: Call, deadline: float | None, report: Report, head: dict[str, Any]
    ) -> AsyncGenerator[bytes, None]:
        """An empty item once the server has accepted, and then its answer; that of a raw call has its own `head`."""
        blame = target.blame
        is_raw = isinstance(call.body, bytes)
        request = self._client.build_request(
            call.method,
            target.url(call),
            content=target.content(call),
            headers=_headers(call, blame.key),
            timeout=httpx.Timeout(target.silence_s, connect=CONNECT_S, pool=None),
        )
        reading = Answer(call, report, renamed=target.model is not None)
        try:
            async with asyncio.timeout_at(deadline):
                answer = await self._send(request, is_retried=blame.is_retried)
            try:
                async with asyncio.timeout_at(deadline):
                    await _check_head(blame, call, answer)
                if is_raw:
                    passed = {name: value for name, value in answer.headers.items() if name not in UNPASSED}
                    head |= {"status": answer.status_code, "headers": passed}
                yield b""
                if is_raw:
                    parts = _timed(answer, deadline)
                else:
                    parts = _stream(answer, deadline, reading) if call.stream else _whole(answer, deadline, reading)
                async with contextlib.aclosing(parts):
                    async for part in parts:
                        yield part
            finally:
                await answer.aclose()
                reading.end()
        except Unreadable as error:
            raise blame.unreadable(str(error)) from None
        except TimeoutError:
            raise BackendTimeout("the request ran longer than it may", phase="running") from None
        except (httpx.ConnectError, httpx.ConnectTimeout):
            raise blame.unreachable() from None
        except httpx.TimeoutException:
            raise blame.silent() from None
        except httpx.TransportError:
            raise blame.lost() from None

    async def _send(self, request: httpx.Request, *, is_retried: bool) -> httpx.Response:
        """The head of the answer to a request.

        A kept connection may have been closed by its server in this very moment: llama.cpp's closes each of them behind
        a stream, and says nothing of it. That is no death of a server, and the request goes out on another one, if it
        may be sent again.
        """
        for _ in range(STALE):
            is_new = False

            async def trace(event: str, _info: Any) -> None:
                nonlocal is_new
                is_new = is_new or event.startswith("connection.connect")

            request.extensions["trace"] = trace
            try:
                return await self._client.send(request, stream=True)
            except (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError):
                if is_new or not is_retried:
                    raise
        return await self._client.send(request, stream=True)


def _without_bound(call: Call) -> Call | None:
    """A chat without the tokens that it asks for, where they are a bound and no wish; None where they are not."""
    body = call.body
    if isinstance(body, bytes) or call.path != CHAT or not body.get("clamp_max_tokens") or not body.get("max_tokens"):
        return None
    return replace(call, body={name: value for name, value in body.items() if name != "max_tokens"})


def _is_refused(error: PoolError) -> bool:
    """Whether a server has found something wrong with the request itself."""
    return isinstance(error, InvalidRequest) or error.code == "upstream_invalid_request"


def _may_pass(error: PoolError) -> bool:
    """Whether what went wrong may go better a moment later."""
    passing = ("upstream_connection_error", "upstream_timeout", "upstream_rate_limit", "upstream_server_error")
    return error.code in passing


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


async def _check_head(blame: Blame, call: Call, answer: httpx.Response) -> None:
    """Raise what a refusal means, or `Unreadable` where the head announces something that was not asked for.

    A raw call gets whatever the server says, but for what is between the pool and its server.
    """
    is_raw = isinstance(call.body, bytes)
    if answer.status_code != 200 and (not is_raw or answer.status_code in (401, 403)):
        raise await blame.refusal(answer)
    if len(answer.headers.raw) > MAX_HEADERS:
        raise Unreadable(f"it sent more than {MAX_HEADERS} headers")
    if answer.headers.get("content-encoding", "identity") != "identity":
        raise Unreadable("its answer is compressed, which was not asked for")
    kind = answer.headers.get("content-type", "")[:MAX_MESSAGE]
    if call.stream and not kind.startswith("text/event-stream"):
        raise Unreadable(f"a stream was asked for, and {kind or 'something without a type'} came")


async def _timed(answer: httpx.Response, deadline: float | None) -> AsyncGenerator[bytes, None]:
    """The raw parts of an answer. Raises `TimeoutError` at the deadline; time that the reader takes counts as well."""
    parts: AsyncIterator[bytes] = answer.aiter_raw()
    while True:
        # Around each read and never around a `yield`, where it would cancel whoever reads.
        async with asyncio.timeout_at(deadline):
            part = await anext(parts, None)
        if part is None:
            return
        yield part


async def _stream(answer: httpx.Response, deadline: float | None, reading: Answer) -> AsyncGenerator[bytes, None]:
    """The stream's events, never half of one: if the server is lost, an error event can follow what was sent."""
    splitter = EventSplitter()
    async for part in _timed(answer, deadline):
        if (events := splitter.push(part)) and (given := reading.events(events)):
            yield given
    rest = splitter.finish()
    if given := (reading.events(rest) if rest else b"") + reading.finish():
        yield given
    if not reading.is_whole:
        # Where an answer ends with its connection, nothing else tells.
        raise httpx.ReadError("the stream has no end")


async def _whole(answer: httpx.Response, deadline: float | None, reading: Answer) -> AsyncGenerator[bytes, None]:
    yield await reading.body(*await one_body(_timed(answer, deadline)))
