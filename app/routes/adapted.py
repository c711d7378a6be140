"""Runs the families that stand on the chat stream: one way from a family's body through the pool to its answer.

Whatever is wrong before the first sign of life has its true status; from then on it is the family's error event. The
stream of the gateway is closed at the end, however that comes, which frees the slot.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any

from fastapi import Request, Response

from app.asking import asked
from app.auth import caller_of
from app.body import read_json
from app.streams import Rhythm, Stream
from app.wire.adapter import Adapter, WholeAdapter
from cluster import errors
from cluster.request import Request as PoolRequest
from deployments.gateway import Gateway
from deployments.requests import model_of, patient
from deployments.run_info import RunInfo
from deployments.sse import is_comment

logger = logging.getLogger("slotpool.http")

#: Clients choose the names in the header that says what was ignored.
MAX_IGNORED = 1000

#: Called when all of an answer has been rendered, and before the client gets the last of it.
OnEnd = Callable[[], Awaitable[None]]


async def read_body(request: Request) -> dict[str, Any]:
    """The request's JSON object. Whatever else is wrong with it, a model that the sender cannot use is said first."""
    gateway: Gateway = request.app.state.gateway
    body: dict[str, Any] = await read_json(request, gateway.config.max_body_mb)
    # Some families' errors say which model the request was about.
    request.state.model = body.get("model") if isinstance(body, dict) else None
    model_of(gateway.config, body, caller_of(request))
    return body


def admitted(
    request: Request, adapter: WholeAdapter, *, is_patient: bool = False
) -> tuple[PoolRequest, dict[str, Any]]:
    """The adapter's chat as it travels, and as its engine gets it. Raises what is wrong with it."""
    wanted, chat = asked(request, adapter.path, adapter.chat)
    return (patient(request.app.state.gateway.config, wanted) if is_patient else wanted), chat


async def answer(
    request: Request, adapter: Adapter, on_end: OnEnd | None = None, *, is_patient: bool = False
) -> Response:
    """Run the adapter's chat through the pool, and answer in its family's way.

    One that `is_patient` waits as `deployments.requests.patient` says.
    """
    if not adapter.chat.get("stream"):
        return await answer_whole(request, adapter, on_end, is_patient=is_patient)
    gateway: Gateway = request.app.state.gateway
    wanted, chat = admitted(request, adapter, is_patient=is_patient)
    info = RunInfo()
    chunks = gateway.stream(wanted, chat, info)
    rest = events(adapter, chunks, info, on_end)
    try:
        first = await anext(rest)
    except BaseException:
        await rest.aclose()
        raise
    return Stream(first, rest, media_type=adapter.media_type, headers=ignored_header(adapter.ignored, wanted))


async def answer_whole(
    request: Request, adapter: WholeAdapter, on_end: OnEnd | None = None, *, is_patient: bool = False
) -> Response:
    """Run the adapter's chat through the pool, and answer once it is over."""
    gateway: Gateway = request.app.state.gateway
    wanted, chat = admitted(request, adapter, is_patient=is_patient)
    info = RunInfo()
    chunks = gateway.stream(wanted, chat, info)
    body = adapter.whole(await completion_of(chunks), info)
    if on_end is not None:
        await on_end()
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Response(content, headers=ignored_header(adapter.ignored, wanted), media_type="application/json")


def ignored_header(ignored: Sequence[str], wanted: PoolRequest) -> dict[str, str]:
    """The header that says what was left out, which is also logged."""
    if not ignored:
        return {}
    names = ", ".join(ignored).encode("ascii", "replace").decode()
    names = "".join(each if each.isprintable() else "?" for each in names)[:MAX_IGNORED]
    logger.info("request %s to %s: ignored %s", wanted.trace, wanted.model, names)
    return {"X-Slotpool-Ignored": names}


async def events(
    adapter: Adapter, chunks: AsyncGenerator[bytes, None], info: RunInfo, on_end: OnEnd | None = None
) -> AsyncGenerator[bytes, None]:
    """The family's stream, one item for each that came. Raises a `PoolError` for a failure before the first."""
    opening = b""
    rhythm: Rhythm | None = None
    has_begun = False
    cut = b""
    async with contextlib.aclosing(chunks):
        async for chunk in chunks:
            if not has_begun:
                opening, has_begun = adapter.begin(), True
            if is_comment(chunk):
                counts = rhythm is None or rhythm.is_due()
                rhythm = rhythm or Rhythm()
                yield opening + adapter.waiting(chunk, counts=counts)
                opening = b""
                continue
            # A very large event comes in parts.
            whole, end, cut = (cut + chunk).rpartition(b"\n\n")
            rendered, error = _rendered(adapter, whole + end, info)
            if opening or rendered:
                yield opening + rendered
                opening = b""
            if error is not None:
                break
        else:
            error = None
        # Whoever failed, or left out the end, holds no slot any longer.
    opening = opening if has_begun else adapter.begin()
    last = adapter.failed(error) if error is not None else adapter.end(info)
    if on_end is not None:
        await on_end()
    yield opening + last


async def completion_of(chunks: AsyncGenerator[bytes, None]) -> dict[str, Any]:
    """The whole chat completion of a gateway's answer that is not a stream. Raises a `PoolError`."""
    async with contextlib.aclosing(chunks):
        return parsed(b"".join([chunk async for chunk in chunks]))


def _rendered(adapter: Adapter, stream: bytes, info: RunInfo) -> tuple[bytes, errors.PoolError | None]:
    """What a part of the chat stream is in the family's words, and the error that ends it."""
    rendered: list[bytes] = []
    for event in stream.split(b"\n\n"):
        data = event.partition(b"data:")[2].strip()
        if not data or data == b"[DONE]":
            continue
        try:
            chunk = parsed(data)
        except errors.PoolError as error:
            return b"".join(rendered), error
        if "error" in chunk:
            return b"".join(rendered), info.failure or _error_of(chunk["error"])
        rendered.append(adapter.feed(chunk))
    return b"".join(rendered), None


def parsed(data: bytes) -> dict[str, Any]:
    """The object that an engine sent. Raises `BackendUnavailable` where it is none."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise errors.BackendUnavailable(
            "the engine's answer cannot be understood", status=502, code="upstream_response_parse_failure"
        )
    return value


def _error_of(said: Any) -> errors.PoolError:
    """The error that a server sent in its stream, in its own words."""
    error = said if isinstance(said, dict) else {"message": said}
    code = error.get("code")
    return errors.BackendUnavailable(
        str(error.get("message")), status=502, code=code if isinstance(code, str) else "upstream_server_error"
    )
