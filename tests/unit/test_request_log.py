"""The log of requests: one line each, whatever became of it, and nothing of what was asked or answered."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest

from cluster import errors
from cluster.config import ConfigError, load_config
from cluster.request import Request
from deployments.engines.protocol import Call, Report
from deployments.request_log import RequestLog
from deployments.run_info import RunInfo
from deployments.sse import DONE
from tests.unit.test_gateway import BODY, EVENT, GONE, Scripted

REQUEST = Request("attempt", "coder", priority=1, principal="team", trace="client-7")


class Logged:
    """A log in a file, and the lines in it."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.log = RequestLog()
        self.log.follow(load_config({"request_log": str(file)}, environ={}))

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.file.read_text().splitlines()]

    async def run(self, info: RunInfo, *steps: bytes | Exception) -> None:
        async def chunks() -> AsyncGenerator[bytes, None]:
            for step in steps:
                if isinstance(step, Exception):
                    raise step
                yield step

        async with contextlib.aclosing(self.log.around(REQUEST, info, chunks(), is_stream=True)) as answer:
            async for _ in answer:
                pass


@pytest.fixture
def logged(tmp_path: Path) -> Logged:
    return Logged(tmp_path / "its" / "folder" / "requests.log")


async def test_a_line_says_who_asked_for_what_and_where_the_time_went(logged: Logged):
    call = Call("/v1/chat/completions", {"model": "coder-b", "messages": "a secret"}, "client-7", queue_wait_ms=12.5)
    info = RunInfo(call=call, report=Report(prompt_tokens=3, output_tokens=2, total_ms=9.0))
    await logged.run(info, EVENT, EVENT, DONE)
    (line,) = logged.lines()
    metrics = line.pop("metrics")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", line.pop("time"))
    assert line == {
        "level": "info",
        "event": "slotpool.inference",
        "request_id": "client-7",
        "model": "coder-b",
        "requested_model": "coder",
        "family": "chat",
        "principal": "team",
        "priority": "high",
        "stream": True,
        "status": 200,
        "error": None,
    }
    assert set(metrics) == set(info.metrics())
    assert (metrics["engine_queue_wait_ms"], metrics["engine_prompt_tokens"], metrics["engine_output_tokens"]) == (
        12.5,
        3,
        2,
    )
    assert "secret" not in logged.file.read_text()


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (errors.BudgetExceeded("the key 'team' has used its tokens"), 402, "budget_exceeded"),
        (errors.ReplicaGone("gone"), 503, errors.ReplicaGone.code),
        (ZeroDivisionError(), 500, "INTERNAL_ERROR"),
    ],
)
async def test_a_refusal_and_a_bug_have_their_line(logged: Logged, error: Exception, status: int, code: str):
    with pytest.raises(type(error)):
        await logged.run(RunInfo(), error)
    (line,) = logged.lines()
    assert (line["status"], line["error"], line["model"]) == (status, code, "coder")
    assert line["metrics"]["engine_total_wall_ms"] is None


@pytest.mark.parametrize(("last", "status"), [(DONE, 200), (EVENT, 499)])
async def test_who_leaves_early_is_told_from_who_leaves_behind_the_last_word(logged: Logged, last: bytes, status: int):
    async def chunks() -> AsyncGenerator[bytes, None]:
        yield last
        yield b": never asked for\n\n"

    async with contextlib.aclosing(logged.log.around(REQUEST, RunInfo(), chunks(), is_stream=True)) as answer:
        await anext(answer)
    assert [line["status"] for line in logged.lines()] == [status]


async def test_the_gateway_logs_every_request_once_and_a_stream_that_broke_by_its_error(tmp_path: Path):
    gateway = Scripted([BODY], [EVENT, GONE], [GONE], [GONE])
    file = tmp_path / "log"
    gateway.request_log.follow(load_config({"request_log": str(file)}, environ={}))
    assert [chunk async for chunk in gateway.stream(REQUEST, {})] == [BODY]
    sent = [chunk async for chunk in gateway.stream(REQUEST, {"stream": True})]
    assert len(sent) == 2
    with pytest.raises(errors.ReplicaGone):
        [chunk async for chunk in gateway.stream(REQUEST, {"stream": True})]
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(line["stream"], line["status"], line["error"]) for line in lines] == [
        (False, 200, None),
        (True, GONE.status, GONE.code),
        (True, GONE.status, GONE.code),
    ]


async def test_a_file_that_was_moved_away_is_made_anew(logged: Logged):
    await logged.run(RunInfo(), BODY)
    logged.file.rename(logged.file.with_suffix(".1"))
    await logged.run(RunInfo(), BODY)
    assert len(logged.lines()) == 1


async def test_the_log_follows_the_configuration(logged: Logged, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    logged.log.follow(load_config({}, environ={}))
    assert not logged.log.is_on
    (tmp_path / "file").touch()
    logged.log.follow(load_config({"request_log": str(tmp_path / "file" / "log")}, environ={}))
    assert not logged.log.is_on
    assert "requests are not logged" in caplog.text
    logged.log.follow(load_config({"request_log": "stderr"}, environ={}))
    assert logged.log.is_on
    assert logged.lines() == []


def test_a_file_has_an_absolute_path():
    with pytest.raises(ConfigError, match="request_log: must be stderr, or the absolute path of a file"):
        load_config({"request_log": "requests.log"}, environ={})
