"""Servers that a supervisor has started by a command: its process tree, its death, and what is left of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.frames import ConnectionEnded
from cluster.orders import EngineState, Restart, Unload
from deployments.host_memory import tree_of
from deployments.supervisor import Place, Supervisor
from tests.unit.raylet import Raylet, lives, started_raylet, wait_until
from tests.unit.test_supervisor import Ledger, stream

SCRIPT = str(Path(__file__).parents[1] / "commands" / "scripted_server.py")


def served(*options: str) -> dict[str, Any]:
    command = [sys.executable, SCRIPT, "--port", "${PORT}", *options]
    # The interpreter is the command's, not that of the engine process.
    keys = {"python": sys.executable, "model_path": str(Path(SCRIPT).parent)}
    return {"backend": "server", **keys, "engine_kwargs": {"command": command}}


@pytest.fixture(scope="module")
def raylet() -> Iterator[Raylet]:
    with started_raylet() as raylet:
        yield raylet


@pytest.fixture
async def ledger() -> Ledger:
    return Ledger()


@pytest.fixture
async def supervisor(raylet: Raylet, ledger: Ledger) -> AsyncIterator[Supervisor]:
    async def place() -> Place:
        return Place("here", raylet.home, raylet.home.folder / "log", "")

    supervisor = Supervisor("m", "uid", ledger, place)
    following = asyncio.create_task(supervisor.follow_orders())
    yield supervisor
    following.cancel()
    await asyncio.wait_for(supervisor.finish(), 20)


async def test_a_server_that_is_started_is_told_with_its_own_pid_and_url(supervisor: Supervisor, ledger: Ledger):
    ledger.load(served("--child"))
    _, _, engine = await ledger.hears()
    assert isinstance(engine, EngineState)
    assert engine.url is not None
    assert b'"0 "' in await stream(engine)
    tree = list(tree_of(engine.pid))
    assert len(tree) == 2, "it has a process of its own"
    assert os.getpgid(engine.pid) == os.getpgid(tree[1]) != os.getpgrp()
    ledger.give(Unload("it may go"))
    assert await ledger.hears() == ("engine_unloaded", "uid")
    assert not any(map(lives, tree))


async def test_a_server_that_dies_takes_its_stream_along_and_says_why(supervisor: Supervisor, ledger: Ledger):
    ledger.load(served("--child", "--tokens", "50", "--die-at", "3"))
    _, _, engine = await ledger.hears()
    tree = list(tree_of(engine.pid))
    # There may be no time left for an error event; then the gateway makes one.
    with contextlib.suppress(ConnectionEnded):
        assert b'"error"' in await stream(engine)
    assert await ledger.hears() == ("engine_died", "uid", "the server ended with exit status 3")
    assert not any(map(lives, tree))
    ledger.load(served())
    assert (await ledger.hears())[0] == "replica_ready"


async def test_a_server_that_hangs_is_restarted_and_a_busy_one_is_not(supervisor: Supervisor, ledger: Ledger):
    ledger.load(served())
    _, _, engine = await ledger.hears()
    ledger.give(Restart("it seemed to hang"))
    assert await ledger.hears() == ("replica_ready", "uid", engine), "it answers"
    async with httpx.AsyncClient(trust_env=False) as http:
        await http.post(f"{engine.url}/hang", json={"model": "m"})
    ledger.give(Restart("it hangs"))
    assert (await ledger.hears())[:2] == ("engine_died", "uid")
    assert not lives(engine.pid)


async def test_a_server_ends_with_its_engine_process_and_its_replica(supervisor: Supervisor, ledger: Ledger):
    ledger.load(served("--stubborn", "--child"))
    _, _, engine = await ledger.hears()
    tree = list(tree_of(engine.pid))
    os.kill(parent_of(engine.pid), signal.SIGKILL)
    assert (await ledger.hears())[:2] == ("engine_died", "uid")
    wait_until(lambda: not any(map(lives, tree)))


async def test_a_server_that_never_serves_leaves_nothing(supervisor: Supervisor, ledger: Ledger):
    ledger.load(served("--ready-after", "1000", "--child"))
    await asyncio.sleep(1.0)
    ledger.give(Unload("too long"))
    assert await ledger.hears() == ("engine_unloaded", "uid")
    ledger.load(served("--exit", "5"))
    kind, _, why = await ledger.hears()
    assert (kind, why) == (
        "replica_failed",
        "the server ended with exit status 5 before it was ready; its log says more",
    )
    wait_until(lambda: not [pid for pid in all_pids() if SCRIPT in command_of(pid)])


def parent_of(pid: int) -> int:
    return int(Path("/proc", str(pid), "stat").read_text().rsplit(") ", 1)[1].split()[1])


def all_pids() -> list[int]:
    return [int(each.name) for each in Path("/proc").glob("[0-9]*")]


def command_of(pid: int) -> str:
    try:
        return Path("/proc", str(pid), "cmdline").read_text()
    except OSError:
        return ""
