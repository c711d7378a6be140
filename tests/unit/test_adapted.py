"""The one way from a family's route through the pool: what comes first, what an error looks like, and when."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.requests import Request
from starlette.routing import Route

from app import streams
from app.routes import adapted
from app.wire.adapter import EVENT_STREAM
from cluster import errors
from cluster.errors import PoolError
from deployments.requests import CHAT
from deployments.run_info import RunInfo
from deployments.sse import DONE
from tests.unit.scripted import LOADING, QUEUED, Scripted, chunk, events, said


class Words:
    """The smallest adapter: says what it was told, one line each."""

    media_type, path = EVENT_STREAM, CHAT

    def __init__(self, body: dict[str, Any], ignored: tuple[str, ...] = ()) -> None:
        self.chat = {"messages": [{"role": "user", "content": "x"}], **body}
        self.ignored = list(ignored)

    def begin(self) -> bytes:
        return b"begin\n"

    def waiting(self, comment: bytes, *, counts: bool) -> bytes:
        return b"event\n" if counts else b"comment\n"

    def feed(self, chunk: dict[str, Any]) -> bytes:
        return b"".join(b"+" + each["delta"].get("content", "").encode() for each in chunk["choices"])

    def end(self, info: RunInfo) -> bytes:
        return f"end {info.report.output_tokens} of {info.model}".encode()

    def failed(self, error: PoolError) -> bytes:
        return f"failed {error.code} {error.status}".encode()

    def whole(self, completion: dict[str, Any], info: RunInfo) -> dict[str, Any]:
        return {"whole": completion["x"], "total_ms": info.metrics()["engine_total_wall_ms"]}


async def ask(gateway: Scripted, body: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    async def route(request: Request) -> Any:
        given = await adapted.read_body(request)
        return await adapted.answer(request, Words(given, **kwargs))

    http = gateway.http()
    http._transport.app.router.routes.insert(0, Route("/v1/messages", route, methods=["POST"]))
    async with http:
        return await http.post("/v1/messages", json={"model": "m", "stream": True} | (body or {}))


async def test_a_stream_begins_with_its_first_chunk_and_ends_with_the_report():
    gateway = Scripted(said("a", "b"))
    answer = await ask(gateway)
    assert answer.text == "begin\n+a+b+end 2 of m"
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert "x-slotpool-ignored" not in answer.headers
    assert gateway.closed == 1


async def test_a_whole_answer_gets_the_report_too():
    gateway = Scripted([b'{"x": 1}'])
    assert (await ask(gateway, {"stream": False})).json() == {"whole": 1, "total_ms": 9.0}


async def test_what_was_left_out_is_said_and_logged(caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO", logger="slotpool.http")
    answer = await ask(Scripted(said("a")), ignored=("tools.web_search", "include"))
    assert answer.headers["x-slotpool-ignored"] == "tools.web_search, include"
    assert "ignored tools.web_search, include" in caplog.text


async def test_a_waiting_stream_counts_its_first_sign_and_then_every_15_seconds(monkeypatch: pytest.MonkeyPatch):
    now = 0.0

    class Clock:
        @staticmethod
        def monotonic() -> float:
            nonlocal now
            now += 5.0
            return now

    monkeypatch.setattr(streams, "time", Clock)
    answer = await ask(Scripted([QUEUED, *[LOADING] * 6, *said("a")]))
    assert answer.text.split("+")[0].split() == ["begin", "event", *["comment", "comment", "event"] * 2]


@pytest.mark.parametrize("signs", [[], [QUEUED]])
async def test_an_error_is_a_status_before_the_first_sign_and_an_event_behind_it(signs: list[bytes]):
    answer = await ask(Scripted([*signs, errors.BackendTimeout("late", phase="queued")]))
    if signs:
        assert (answer.status_code, answer.text) == (200, "begin\nevent\nfailed BACKEND_TIMEOUT 504")
    else:
        assert answer.status_code == 504
        assert answer.json()["error"]["type"] == "timeout_error"


@pytest.mark.parametrize(
    ("step", "failed"),
    [
        (errors.BackendUnavailable("cut"), "failed BACKEND_UNAVAILABLE 503"),
        (b"data: {broken\n\n", "failed upstream_response_parse_failure 502"),
        (b"data: 7\n\n", "failed upstream_response_parse_failure 502"),
        (b'data: {"error": {"message": "x", "code": "theirs"}}\n\n', "failed theirs 502"),
        (b'data: {"error": "x"}\n\n', "failed upstream_server_error 502"),
    ],
)
async def test_a_stream_that_fails_ends_with_its_error_and_gives_the_slot_back(step: Any, failed: str):
    gateway = Scripted([chunk({"content": "a"}), step, chunk({"content": "never"})])
    assert (await ask(gateway)).text == f"begin\n+a{failed}"
    assert gateway.closed == 1


async def test_an_event_that_comes_in_parts_is_one():
    event = chunk({"content": "long"})
    assert (await ask(Scripted([event[:9], event[9:30], event[30:] + DONE]))).text.startswith("begin\n+longend")


async def test_the_model_is_named_first_whatever_else_is_wrong():
    answer = await ask(Scripted(), {"model": "none", "messages": 7})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "MODEL_NOT_FOUND")
    answer = await ask(Scripted(), {"messages": 7})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")


@pytest.mark.parametrize(
    ("path", "status", "body"),
    [
        ("/v1/responses", 503, {"error": {"type": "rate_limit_error"}}),
        ("/v1/messages", 503, {"type": "error", "error": {"type": "overloaded_error"}}),
        ("/v1/chat/completions", 429, {"error": {"type": "rate_limit_error"}}),
        ("/llm-pool/v1/responses", 429, {"detail": {"code": "executor_queue_full"}}),
        ("/api/chat", 429, {"error": "full"}),
    ],
)
def test_a_refusal_for_load_has_the_status_that_the_familys_clients_retry(path: str, status: int, body: Any):
    from app.answers import error_response

    answer = error_response(errors.QueueFull("full", retry_after=99.0, queue_position=4), path=path)
    assert answer.status_code == status
    assert (answer.headers["retry-after"], answer.headers["x-queue-position"]) == ("20", "4")
    said = json.loads(answer.body)
    for name, value in body.items():
        assert said[name] == value if isinstance(value, str) else value.items() <= said[name].items()


async def test_a_chat_that_waits_gets_empty_events_and_its_error_as_an_event():
    gateway = Scripted([QUEUED, LOADING, *said("a")], [QUEUED, errors.BackendTimeout("late", phase="queued")])
    async with gateway.http() as http:
        body = {"model": "m", "stream": True, "messages": [{"role": "user", "content": "x"}]}
        text = (await http.post(CHAT, json=body)).text
        assert text.startswith(QUEUED.decode() + "data: {")
        first, second, *_ = events(text)
        assert first["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": None}]
        assert second["choices"][0]["delta"] == {"content": "a"}
        failed = events((await http.post(CHAT, json=body)).text)
        assert [each.get("error", {}).get("code") for each in failed] == [None, "BACKEND_TIMEOUT"]
    assert gateway.closed == 2
