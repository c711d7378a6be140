"""Requests that run on an external OpenAI-compatible server: bytes in, bytes out.

The body goes as it came, with the fields beside it that keep the server from unloading the model in between; the
answer comes as it was sent, whole events at a time. Whatever goes wrong is one of the contract's errors, and none of
them holds the server's key.
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import httpx

from cluster.config import ServerEntry
from cluster.errors import BackendTimeout, BackendUnavailable, PoolError, RateLimited, ReplicaGone
from cluster.servers.types import base_url, hold_fields
from deployments.coalesce import coalesce
from deployments.engines.protocol import Call

#: A server on a network answers a connection within this time, in seconds, or is taken to be away.
CONNECT_S = 5.0
#: How much of a refusal's body is read, and how much of its message is passed on, in characters.
MAX_REFUSAL, MAX_MESSAGE = 65_536, 500


class Upstreams:
    """All external servers, as the requests of one process call them."""

    def __init__(self) -> None:
        # A connection for each request: one that is kept may be closed by the server in the moment of its next use,
        # which could not be told from a server that died.
        self._client = httpx.AsyncClient(
            timeout=httpx.Timeout(None, connect=CONNECT_S),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
        )

    async def generate(
        self, server: ServerEntry, call: Call, keep_alive_s: float, timeout_s: float
    ) -> AsyncGenerator[bytes, None]:
        """The server's answer to one leased call: whole SSE events, or one JSON body. Closing it ends the request.

        Raises `ReplicaGone` when the server cannot be reached or is lost, `BackendTimeout` after `timeout_s`, and the
        upstream errors of CONTRACT section 6 for what it refuses.
        """
        source = coalesce(self._answer(server, call, keep_alive_s), _at_once, timeout_s)
        try:
            async for chunk in source:
                yield chunk
        except TimeoutError:
            raise BackendTimeout("the request ran longer than it may", phase="running") from None
        finally:
            await source.aclose()

    async def _answer(self, server: ServerEntry, call: Call, keep_alive_s: float) -> AsyncGenerator[bytes, None]:
        key = _key(server)
        request = self._client.build_request(
            "POST",
            base_url(server.url) + call.path,
            content=json.dumps({**call.json, **hold_fields(server.server_type, keep_alive_s)}).encode(),
            headers=_headers(call, key),
        )
        try:
            answer = await self._client.send(request, stream=True)
            try:
                if answer.status_code != 200:
                    raise await _refusal(server, answer, key)
                parts = _whole_events(answer) if call.stream else _one_body(answer)
                async for part in parts:
                    yield part
            finally:
                await answer.aclose()
        except (httpx.ConnectError, httpx.ConnectTimeout):
            raise _gone(f"the server {server.url} cannot be reached") from None
        except httpx.TimeoutException:
            raise BackendTimeout(
                f"the server {server.url} did not answer in time", code="upstream_timeout", phase="running"
            ) from None
        except httpx.TransportError:
            raise _gone(f"the connection to the server {server.url} was lost") from None


def _at_once() -> float:
    return 0.0


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
    headers = {
        "Content-Type": "application/json",
        "Accept": "text/event-stream" if call.stream else "application/json",
        # The bytes are passed on as they come, so they must not be compressed.
        "Accept-Encoding": "identity",
        "X-Request-Id": call.request_id,
    }
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    return headers


async def _whole_events(answer: httpx.Response) -> AsyncIterator[bytes]:
    """The stream's bytes, never half an event: if the server is lost, an error event can follow what was sent."""
    kind = answer.headers.get("content-type", "")
    if not kind.startswith("text/event-stream"):
        raise _unreadable(f"a stream was asked for, and {kind or 'something without a type'} came")
    rest = b""
    async for part in answer.aiter_raw():
        rest += part
        end = max(rest.rfind(mark) + len(mark) if mark in rest else 0 for mark in (b"\n\n", b"\r\n\r\n"))
        if end:
            yield rest[:end]
            rest = rest[end:]
    if rest.strip():
        # Its last event has no blank line behind it; with one, it is whole for everybody.
        yield rest.rstrip() + b"\n\n"


async def _one_body(answer: httpx.Response) -> AsyncIterator[bytes]:
    body = b"".join([part async for part in answer.aiter_raw()])
    try:
        if not isinstance(json.loads(body), dict):
            raise ValueError
    except (ValueError, RecursionError):
        raise _unreadable("its answer is not a JSON object") from None
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
