"""The fake engine at the waist: raw calls, reports, and an engine that takes its process with it."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import multiprocessing.connection
import os

import pytest

from cluster.config import FakeFaults
from cluster.errors import InvalidRequest, RateLimited, UnsupportedParameter
from deployments.engines.fake import FakeEngine
from deployments.engines.protocol import Call, Reply, Report
from deployments.schemas import EMBEDDINGS
from tests.unit.engines.drive import CHAT, COMPLETIONS, ask, stream_of


def fake(**faults: object) -> FakeEngine:
    return FakeEngine("m", FakeFaults(tokens_per_s=1000, **faults))


async def read(reply: Reply) -> bytes:
    return b"".join([chunk async for chunk in reply.chunks])


async def test_a_raw_body_comes_back_with_its_type() -> None:
    sent = bytes(range(256))
    call = Call("/fake/echo", sent, "r", headers={"content-type": "image/x"}, query="a=1")
    reply = await fake().call(call)
    assert (reply.status, reply.headers["content-type"]) == (200, "image/x")
    assert await read(reply) == sent


@pytest.mark.parametrize("size", [3, 20])
async def test_an_embedding_has_the_size_that_was_asked_for(size: int) -> None:
    def call(**fields: object) -> Call:
        return Call(EMBEDDINGS, {"model": "m", "input": "x", **fields}, "r")

    whole, sized = [
        json.loads(await read(await fake().call(each)))["data"][0]["embedding"]
        for each in (call(), call(dimensions=size))
    ]
    assert len(sized) == size
    assert sized[:8] == whole[:size]
    with pytest.raises(UnsupportedParameter) as refused:
        await fake().call(call(dimensions=10**9))
    assert refused.value.param == "dimensions"


async def test_it_tells_the_environment_of_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,3")
    reply = await fake().call(Call("/fake/environment", b"", "r", method="GET"))
    assert json.loads(await read(reply)) == {"pid": os.getpid(), "CUDA_VISIBLE_DEVICES": "1,3"}


@pytest.mark.parametrize("stream", [False, True])
async def test_the_report_is_complete_when_the_chunks_have_ended(stream: bool) -> None:
    reply = await fake(tokens=4).call(Call(CHAT, {"model": "m", "stream": stream}, "r"))
    await read(reply)
    assert (reply.report.prompt_tokens, reply.report.output_tokens) == (1, 4)
    assert reply.report.total_ms is not None
    assert reply.report.ttft_ms is not None
    assert reply.report.total_ms >= reply.report.ttft_ms


@pytest.mark.parametrize(
    ("slots", "order"), [(1, [0, 0, 1, 1, 2, 2, 3, 3]), (2, [0, 1, 0, 1, 2, 3, 2, 3]), (8, [0, 1, 2, 3] * 2)]
)
async def test_choices_run_in_turns_within_the_slots(slots: int, order: list[int]) -> None:
    fields = {"prompt": ["a", "b"], "n": 2, "stream": True, "stream_options": {"include_usage": True}}
    reply = await fake(tokens=2).call(Call(COMPLETIONS, fields, "r", slots=slots))
    events = [json.loads(event[6:]) for event in (await read(reply)).split(b"\n\n") if event.startswith(b"data: {")]
    words = [event["choices"][0]["index"] for event in events if event["choices"][0]["text"]]
    assert words == order
    assert [event["choices"][0]["index"] for event in events if event["choices"][0]["finish_reason"]] == [0, 1, 2, 3]
    assert events[-1]["usage"] == {"prompt_tokens": 2, "completion_tokens": 8, "total_tokens": 10}
    assert reply.report.output_tokens == 8
    whole = json.loads(await read(await fake(tokens=2).call(Call(COMPLETIONS, {**fields, "stream": False}, "r"))))
    assert [choice["text"] for choice in whole["choices"]] == ["m:0 m:1 "] * 4
    assert whole["usage"] == events[-1]["usage"]


async def test_a_stream_that_was_closed_reports_what_it_made() -> None:
    reply = await fake(tokens=1000).call(Call(CHAT, {"model": "m", "stream": True}, "r"))
    for _ in range(3):
        await anext(reply.chunks)
    await reply.chunks.aclose()
    assert reply.report.output_tokens == 3
    assert reply.report.total_ms is not None


async def test_refusals_come_before_there_is_a_reply() -> None:
    with pytest.raises(RateLimited):
        await fake(fault="rate_limited").call(Call(CHAT, {}, "r"))
    with pytest.raises(InvalidRequest):
        await fake().call(Call("/v1/rerank", {}, "r"))


def test_calls_and_reports_are_plain_data() -> None:
    call = Call(CHAT, ask("hi"), "r", headers={"a": "b"}, slots=3, queue_wait_ms=2.0)
    head = json.loads(json.dumps(call.head()))
    assert Call.of({**head, "from_a_newer_version": 1}, call.body) == call
    report = Report(prompt_tokens=3, ttft_ms=1.5)
    assert report.as_dict() == {"prompt_tokens": 3, "ttft_ms": 1.5}
    assert Report.from_dict({**report.as_dict(), "from_a_newer_version": 1}) == report


def test_it_dies_in_the_middle_of_a_stream() -> None:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_die, args=(theirs,))
    process.start()
    theirs.close()
    process.join(60)
    assert process.exitcode == 1
    seen = 0
    while ours.poll():
        try:
            seen += ours.recv() == "chunk"
        except EOFError:
            break
    assert seen == 2


def _die(pipe: multiprocessing.connection.Connection) -> None:
    async def run() -> None:
        async for _ in stream_of(fake(fault="dies_after", tokens=4), Call(CHAT, {"stream": True}, "r")):
            pipe.send("chunk")

    asyncio.run(run())
