"""A web application called in its own process: head, parts, and what it learns of a client that leaves."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from cluster.errors import BackendUnavailable
from deployments.engines.asgi import Head, answer


class Seen:
    """What the application has met."""

    def __init__(self) -> None:
        self.sent = 0
        self.ended = asyncio.Event()
        self.cancelled = asyncio.Event()


@pytest.fixture
def seen() -> Seen:
    return Seen()


@pytest.fixture
def application(seen: Seen) -> Starlette:
    async def echo(request: Request) -> Response:
        body = await request.body()
        shown = {"query": str(request.query_params), "mine": request.headers["x-mine"], "body": body.decode()}
        return JSONResponse(shown, status_code=418, headers={"X-Theirs": "yes"})

    async def count(_: Request) -> Response:
        async def numbers():
            try:
                for number in range(1000):
                    seen.sent += 1
                    yield f"data: {number}\n\n"
                    await asyncio.sleep(0)
            finally:
                seen.ended.set()

        return StreamingResponse(numbers(), media_type="text/event-stream")

    async def wait(request: Request) -> Response:
        try:
            while not await request.is_disconnected():
                await asyncio.sleep(0.005)
        finally:
            seen.cancelled.set()
        return Response()

    async def fail(_: Request) -> Response:
        async def half():
            yield b"half"
            raise ValueError("on purpose")

        return StreamingResponse(half())

    routes = [
        Route("/echo", echo, methods=["POST"]),
        Route("/count", count),
        Route("/wait", wait),
        Route("/fail", fail),
    ]
    return Starlette(routes=routes)


def get(application: Starlette, path: str):
    return answer(application, "GET", path, "", {}, b"")


async def test_an_answer_is_its_head_and_its_body(application: Starlette):
    parts = [part async for part in answer(application, "POST", "/echo", "a=1", {"x-mine": "me"}, b"hello")]
    head, body = parts
    assert isinstance(head, Head)
    assert (head.status, head.headers["x-theirs"]) == (418, "yes")
    assert body == b'{"query":"a=1","mine":"me","body":"hello"}'


async def test_a_stream_comes_part_by_part_and_no_faster_than_it_is_read(application: Starlette, seen: Seen):
    async with aclosing(get(application, "/count")) as parts:
        assert isinstance(await anext(parts), Head)
        assert await anext(parts) == b"data: 0\n\n"
        await asyncio.sleep(0.05)
        assert seen.sent < 10
        rest = [part async for part in parts]
    assert rest[-1] == b"data: 999\n\n"


async def test_a_stream_ends_when_its_reader_leaves(application: Starlette, seen: Seen):
    async with aclosing(get(application, "/count")) as parts:
        await anext(parts)
        await anext(parts)
    await asyncio.wait_for(seen.ended.wait(), 1)
    assert seen.sent < 10


async def test_work_before_the_head_ends_with_its_client(application: Starlette, seen: Seen):
    parts = get(application, "/wait")
    waiting = asyncio.ensure_future(anext(parts))
    await asyncio.sleep(0.05)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await asyncio.wait_for(seen.cancelled.wait(), 1)


async def test_an_answer_that_breaks_off_is_no_answer(application: Starlette):
    parts = get(application, "/fail")
    assert isinstance(await anext(parts), Head)
    assert await anext(parts) == b"half"
    with pytest.raises(BackendUnavailable):
        await anext(parts)
