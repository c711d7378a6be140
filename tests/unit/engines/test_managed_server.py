"""Servers that a command starts, with a scripted one: ready, relayed to, ended in every way, and nothing left over."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from cluster.config import ModelConfig, ServerModel, SglangModel
from cluster.errors import ModelUnavailable, PoolError, ReplicaGone
from deployments.engines import server_process
from deployments.engines.managed_server import ManagedServer, SleepingServer
from deployments.engines.protocol import Call, RunsProcess, Sleeper
from deployments.engines.registry import build_engine
from deployments.host_memory import tree_of
from tests.unit.raylet import lives

SCRIPT = str(Path(__file__).parents[2] / "commands" / "scripted_server.py")


def model(*options: str, **keys: Any) -> ServerModel:
    command = [sys.executable, SCRIPT, "--port", "${PORT}", *options]
    found = ModelConfig.model_validate({"backend": "server", "engine_kwargs": {"command": command}, **keys})
    assert isinstance(found, ServerModel)
    return found


@contextlib.asynccontextmanager
async def loaded(*options: str, **keys: Any) -> AsyncIterator[ManagedServer]:
    engine = build_engine("m", model(*options, **keys), "")
    assert isinstance(engine, ManagedServer)
    await engine.load(lambda _: None)
    try:
        yield engine
    finally:
        await engine.unload()


def call(path: str = "/v1/chat/completions", **fields: Any) -> Call:
    return Call(path, {"model": "m", "messages": [], **fields}, "r")


async def read(engine: ManagedServer, asked: Call) -> bytes:
    reply = await engine.call(asked)
    async with contextlib.aclosing(reply.chunks) as chunks:
        return b"".join([chunk async for chunk in chunks])


async def test_a_command_is_a_model():
    async with loaded("--ready-after", "0.5", "--tokens", "3") as engine:
        info = engine.info()
        assert info.pid is not None
        assert lives(info.pid)
        assert os.getpgid(info.pid) == os.getpgrp(), "it ends with the group of whoever started it"
        assert info.url is not None
        assert info.url.startswith("http://127.0.0.1:")
        assert info.memory_mib
        body = json.loads(await read(engine, call(temperature=0.5)))
        assert json.loads(body["choices"][0]["message"]["content"])["temperature"] == 0.5
        assert body["metrics"]["engine_total_wall_ms"] > 0
        events = (await read(engine, call(stream=True))).split(b"\n\n")
        words = [json.loads(each[6:])["choices"][0]["delta"]["content"] for each in events[:3]]
        assert words == ["0 ", "1 ", "2 "]
        assert json.loads(events[3][6:])["metrics"]["engine_output_tokens"] == 3
        raw = await engine.call(Call("/whatever", b"", "r", "GET"))
        assert (raw.status, raw.headers["content-type"]) == (200, "application/json")
        assert b"asked" in b"".join([chunk async for chunk in raw.chunks])
    assert not lives(info.pid)
    with pytest.raises(ReplicaGone):
        await engine.call(call())


async def test_a_server_that_prints_ten_megabytes_starts_and_fills_no_log(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, "slotpool.server"):
        async with asyncio.timeout(30), loaded("--print", "10"):
            pass
    logged = sum(len(record.getMessage()) for record in caplog.records)
    assert server_process.MAX_LOGGED / 2 < logged < server_process.MAX_LOGGED + 1000
    assert re.search(r"92\d\d lines of the server's output were left out", caplog.text)


async def test_output_is_logged_line_by_line_and_again_in_the_next_period(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    clock = [0.0]
    monkeypatch.setattr(server_process.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(server_process, "MAX_LOGGED", 10)
    lines = server_process._Lines()
    with caplog.at_level(logging.INFO, "slotpool.server"):
        for part in (b"on", b"e\r\n\ntwo\nthree-four\n", b"five\n"):
            lines.add(part)
        clock[0] = server_process.LOG_PERIOD_S
        lines.add(b"six\nse\xffven")
        lines.end()
    said = [record.getMessage() for record in caplog.records]
    assert said == ["one", "two", "2 lines of the server's output were left out", "six", "se�ven"]


async def test_a_server_that_ends_before_it_is_ready_says_so_at_once():
    for options, why in (
        (("--exit", "7"), "ended with exit status 7 before it was ready"),
        (("--print", "1", "--exit", "0"), "ended with exit status 0 before it was ready"),
    ):
        with pytest.raises(ModelUnavailable, match=why):
            async with asyncio.timeout(20), loaded(*options):
                pass
    missing = ModelConfig.model_validate({"backend": "server", "engine_kwargs": {"command": "/no/such-thing ${PORT}"}})
    with pytest.raises(ModelUnavailable, match="'such-thing' cannot be started: No such file"):
        await build_engine("m", missing, "").load(lambda _: None)


async def test_a_load_that_is_given_up_leaves_nothing():
    engine = build_engine("m", model("--ready-after", "1000"), "")
    assert isinstance(engine, ManagedServer)
    loading = asyncio.create_task(engine.load(lambda _: None))
    while (pid := engine.info().pid) is None:
        await asyncio.sleep(0.01)
    loading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await loading
    assert not lives(pid)
    await engine.unload()


async def test_a_death_is_told_and_ends_streams_as_errors():
    async with loaded("--tokens", "100") as engine:
        assert isinstance(engine, RunsProcess)
        dying = asyncio.create_task(engine.died())
        reply = await engine.call(call(stream=True))
        assert b'"0 "' in await anext(reply.chunks)
        pid = engine.info().pid
        assert pid is not None
        os.kill(pid, signal.SIGSEGV)
        with pytest.raises(ReplicaGone, match="connection to the server of m was lost"):
            async for _ in reply.chunks:
                pass
        assert await asyncio.wait_for(dying, 5) == "the server was killed by SIGSEGV"
        with pytest.raises(ReplicaGone):
            await engine.call(call())


async def test_one_that_does_not_end_when_told_is_killed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(server_process, "STOP_S", 0.3)
    async with loaded("--stubborn") as engine:
        pid = engine.info().pid
    assert pid is not None
    assert not lives(pid)


async def test_loads_and_unloads_leave_neither_processes_nor_descriptors():
    async def one() -> None:
        async with loaded() as engine:
            assert await read(engine, call())

    await one()
    before = len(os.listdir("/proc/self/fd")), len(list(tree_of(os.getpid())))
    for _ in range(5):
        await one()
    # Transports close with the loop's next turn.
    await asyncio.sleep(0.05)
    assert (len(os.listdir("/proc/self/fd")), len(list(tree_of(os.getpid())))) == before


def sglang(**keys: Any) -> SglangModel:
    found = ModelConfig.model_validate({"backend": "sglang", "model_path": "/models/folder", **keys})
    assert isinstance(found, SglangModel)
    return found


async def test_sglang_gives_its_memory_back_and_has_it_again(tmp_path: Path):
    # What stands in for the interpreter that has SGLang.
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {SCRIPT} "$@"\n')
    python.chmod(0o700)
    engine = build_engine("m", sglang(python=str(python)), "/models/folder")
    assert isinstance(engine, SleepingServer)
    assert isinstance(engine, Sleeper)
    assert not isinstance(build_engine("m", model(), ""), Sleeper)
    await engine.load(lambda _: None)
    try:
        kept = await engine.sleep()
        assert kept.device_mib == 0
        await engine.wake(lambda _: None)
        assert await read(engine, call())
        reply = await engine.call(Call("/", b"", "r", "GET"))
        said = json.loads(b"".join([chunk async for chunk in reply.chunks]))
        assert said["asked"] == ["/release_memory_occupation", "/resume_memory_occupation", "/v1/chat/completions"]
        assert "--enable-memory-saver" in said["arguments"]
    finally:
        await engine.unload()


async def test_sglang_that_does_not_sleep_says_so(tmp_path: Path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {SCRIPT} --insomniac "$@"\n')
    python.chmod(0o700)
    engine = build_engine("m", sglang(python=str(python)), "/models/folder")
    assert isinstance(engine, SleepingServer)
    await engine.load(lambda _: None)
    try:
        with pytest.raises(PoolError, match="did not do /release_memory_occupation"):
            await engine.sleep()
    finally:
        await engine.unload()
