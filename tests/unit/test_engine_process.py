"""Engine processes with the fake engine: born, loaded, called, killed in every way; none is left over."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.config import ModelConfig
from cluster.errors import ModelUnavailable
from cluster.frames import ConnectionEnded, make_private
from cluster.home import Home
from cluster.orders import Address
from deployments import engine_child
from deployments.engine_child import EngineChild, EngineDied, start_nursery
from deployments.engine_process import at_most_every
from deployments.engines.protocol import Call
from deployments.link import Answer, Leased, Links
from tests.unit.raylet import Raylet, lives, nursery_pid, started_raylet, wait_until


def test_a_load_with_many_steps_is_reported_now_and_then() -> None:
    told: list[float] = []
    often = at_most_every(3600.0, told.append)
    for step in range(100):
        often(step / 100)
    always = at_most_every(0.0, told.append)
    always(0.5)
    always(0.6)
    assert told == [0.0, 0.5, 0.6]


@pytest.fixture(scope="module")
def raylet() -> Iterator[Raylet]:
    with started_raylet() as raylet:
        yield raylet


@pytest.fixture
def own_raylet() -> Iterator[Raylet]:
    """One that the test may do with as it likes."""
    with started_raylet() as raylet:
        yield raylet


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, **more}


def order(home: Home, name: str = "m", **engine_kwargs: Any) -> dict[str, Any]:
    config = ModelConfig.model_validate({"backend": "fake", "engine_kwargs": engine_kwargs})
    return {
        "model": name,
        "replica": f"{name}-uid",
        "config": config.model_dump(mode="json", by_alias=False),
        "overrides": {},
        "unix": str(home.folder / name),
        "host": "",
        "token": "",
    }


async def begin(raylet: Raylet, way: str, **more: str) -> EngineChild:
    log = raylet.home.folder / "log"
    if way == "fork":
        return await EngineChild.fork(raylet.home, environment(**more), log)
    return await EngineChild.start(sys.executable, raylet.home, environment(**more), log)


async def loaded(raylet: Raylet, way: str = "fork", name: str = "m", **engine_kwargs: Any) -> EngineChild:
    child = await begin(raylet, way)
    await child.load(order(raylet.home, name, **engine_kwargs), lambda _: None)
    return child


async def answer(raylet: Raylet, name: str = "m", tokens: int = 3) -> AsyncIterator[bytes]:
    """The chunks of a stream from the engine, over a connection of its own."""
    links = Links("here")
    body = {"model": name, "messages": [], "max_tokens": tokens, "stream": True}
    leased = Leased(f"{name}-uid", "r", 1, 60.0, Call("/v1/chat/completions", body, "r"))
    way = await links.call(Address("here", str(raylet.home.folder / name)), leased)
    try:
        answer = Answer(way)
        await answer.begin()
        async for chunk in answer.chunks():
            yield chunk
    finally:
        way.close()
        links.close()


WAYS = pytest.mark.parametrize("way", ["fork", "start"])


@WAYS
async def test_an_engine_loads_serves_and_finishes(raylet: Raylet, way: str):
    child = await begin(raylet, way, CUDA_VISIBLE_DEVICES="3,1")
    told: list[float] = []
    said = await child.load(order(raylet.home, load_s=0.5), told.append)
    assert (said["pid"], said["devices"]) == (child.pid, "3,1")
    assert told[0] == 0.0
    assert len(told) > 1
    assert os.getpgid(child.pid) == child.pid
    assert os.getsid(child.pid) == child.pid
    assert stat.S_IMODE((raylet.home.folder / "m").stat().st_mode) == 0o600
    assert b"m:0 " in b"".join([chunk async for chunk in answer(raylet)])
    assert await child.ping() == (0, 1)
    await asyncio.wait_for(child.finish(), 10)
    assert child.ended.result() == "the engine process ended with exit status 0"
    assert not lives(child.pid)


async def test_an_interpreters_path_begins_at_the_code(raylet: Raylet, monkeypatch: pytest.MonkeyPatch):
    path = Path(sys.executable)
    monkeypatch.setattr(engine_child, "ROOT", str(path.parent.parent))
    child = await EngineChild.start(
        f"{path.parent.name}/{path.name}", raylet.home, environment(), raylet.home.folder / "log"
    )
    assert await child.ping() == (0, 0)
    await child.end()
    with pytest.raises(ModelUnavailable, match="could not be started"):
        await EngineChild.start("no/such/python", raylet.home, environment(), raylet.home.folder / "log")


@WAYS
@pytest.mark.parametrize("fatal", [signal.SIGSEGV, signal.SIGKILL, signal.SIGABRT])
async def test_a_death_in_mid_stream_is_heard_of_at_once_with_its_reason(
    raylet: Raylet, way: str, fatal: signal.Signals
):
    child = await loaded(raylet, way, tokens_per_s=1)
    other = await loaded(raylet, way, "other", tokens_per_s=20)
    chunks, others = answer(raylet, tokens=100), answer(raylet, "other", tokens=20)
    await anext(chunks)
    await anext(others)
    os.kill(child.pid, fatal)
    with pytest.raises(ConnectionEnded):
        await asyncio.wait_for(anext(chunks), 5)
    assert fatal.name in await asyncio.wait_for(asyncio.shield(child.ended), 5)
    assert b"other:19 " in b"".join([chunk async for chunk in others])
    other.kill()
    await asyncio.wait_for(asyncio.shield(other.ended), 5)


@WAYS
async def test_a_process_that_hangs_is_seen_and_killed(raylet: Raylet, way: str, monkeypatch: pytest.MonkeyPatch):
    child = await loaded(raylet, way)
    assert await child.ping() == (0, 0)
    os.kill(child.pid, signal.SIGSTOP)
    monkeypatch.setattr(engine_child, "PING_S", 0.2)
    assert await child.ping() is None
    child.kill()
    assert await asyncio.wait_for(asyncio.shield(child.ended), 5) == "the engine process was ended"
    assert not lives(child.pid)


@WAYS
async def test_a_load_that_fails_or_dies_says_so(raylet: Raylet, way: str):
    child = await begin(raylet, way)
    with pytest.raises(ModelUnavailable, match="m fails to load"):
        await child.load(order(raylet.home, fault="load_fails"), lambda _: None)
    with pytest.raises(ModelUnavailable, match="ValidationError"):
        await child.load({**order(raylet.home), "overrides": {"nonsense": 1}}, lambda _: None)
    loading = asyncio.create_task(child.load(order(raylet.home, fault="load_hangs"), lambda _: None))
    await asyncio.sleep(0.05)
    os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(EngineDied, match="SIGKILL"):
        await asyncio.wait_for(loading, 5)


@WAYS
async def test_running_calls_end_before_the_process_does(raylet: Raylet, way: str):
    child = await loaded(raylet, way, tokens_per_s=20)
    chunks = answer(raylet, tokens=20)
    await anext(chunks)
    finishing = asyncio.create_task(child.finish())
    assert b"m:19 " in b"".join([chunk async for chunk in chunks])
    await asyncio.wait_for(finishing, 5)
    assert not lives(child.pid)


@WAYS
async def test_a_broken_pipe_ends_no_engine(raylet: Raylet, way: str):
    child = await loaded(raylet, way, tokens_per_s=200)
    ignored = next(line for line in status_of(child.pid, "status").splitlines() if line.startswith(b"SigIgn:"))
    assert int(ignored.split()[1], 16) >> (signal.SIGPIPE - 1) & 1
    for _ in range(20):
        chunks = answer(raylet, tokens=100)
        await anext(chunks)
        await chunks.aclose()
    assert b"m:2 " in b"".join([chunk async for chunk in answer(raylet)])
    await asyncio.wait_for(child.finish(), 10)
    assert child.ended.result() == "the engine process ended with exit status 0"


SUPERVISOR = """
import asyncio, os, signal, sys
from pathlib import Path
from cluster.home import Home
from deployments.engine_child import EngineChild

async def main(raylet, folder, way):
    home = Home(Path(folder), int(raylet))
    log = home.folder / "log"
    if way == "fork":
        child = await EngineChild.fork(home, dict(os.environ), log)
    else:
        child = await EngineChild.start(sys.executable, home, dict(os.environ), log)
    print(child.pid, flush=True)
    await asyncio.sleep(1000)

asyncio.run(main(*sys.argv[1:]))
"""


@WAYS
def test_an_engine_ends_with_its_supervisor(raylet: Raylet, way: str):
    arguments = [sys.executable, "-c", SUPERVISOR, str(raylet.process.pid), str(raylet.home.folder), way]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE) as supervisor:
        assert supervisor.stdout is not None
        pid = int(supervisor.stdout.readline())
        assert lives(pid)
        os.kill(pid, signal.SIGSTOP)
        supervisor.kill()
    wait_until(lambda: not lives(pid))


def status_of(pid: int, what: str) -> bytes:
    return Path("/proc", str(pid), what).read_bytes()


async def test_the_nursery_is_one_process_with_one_thread_and_initialises_nothing(own_raylet: Raylet):
    first, second = await asyncio.gather(begin(own_raylet, "fork"), begin(own_raylet, "fork"))
    pid = nursery_pid(own_raylet.home)
    for child in (first, second):
        assert status_of(child.pid, "stat").rsplit(b") ", 1)[1].split()[1] == str(pid).encode()
    assert len(os.listdir(f"/proc/{pid}/task")) == 1
    # What engines need is imported where it is installed.
    assert (b"libllama" in status_of(pid, "maps")) == (importlib.util.find_spec("llama_cpp") is not None)
    assert b"_raylet" not in status_of(pid, "maps")
    assert b"GOMP_SPINCOUNT=10000" in status_of(pid, "environ")
    first.kill()
    second.kill()


async def test_all_ends_with_the_raylet(own_raylet: Raylet):
    children = [await begin(own_raylet, "fork") for _ in range(2)]
    pids = [nursery_pid(own_raylet.home), *(child.pid for child in children)]
    in_memory = own_raylet.home.make_memory_folder()
    own_raylet.end()
    wait_until(lambda: not any(map(lives, pids)) and not own_raylet.home.folder.exists())
    wait_until(lambda: not in_memory.exists())


async def test_engines_end_with_the_nursery_and_the_next_one_starts_another(own_raylet: Raylet):
    child = await begin(own_raylet, "fork")
    os.kill(nursery_pid(own_raylet.home), signal.SIGKILL)
    await asyncio.wait_for(asyncio.shield(child.ended), 5)
    wait_until(lambda: not lives(child.pid))
    again = await begin(own_raylet, "fork")
    assert await again.ping() == (0, 0)
    again.kill()


BUSY_HOST = """
import os, socket, subprocess, sys, time
from pathlib import Path
from deployments.nursery import Nursery

def host(control):
    helper = subprocess.Popen(["sleep", "1000"])
    Path("pids").write_text(f"{os.getpid()} {helper.pid} ")
    time.sleep(1000)

os.chdir(sys.argv[2])
with socket.socket(socket.AF_UNIX) as listener:
    listener.bind("s")
    listener.listen()
    print(flush=True)
    Nursery(listener, int(sys.argv[1]), host).run()
"""


def test_what_an_engine_has_started_ends_with_it(tmp_path: Path):
    with (
        subprocess.Popen(
            [sys.executable, "-c", BUSY_HOST, str(os.getpid()), str(tmp_path)], stdout=subprocess.PIPE
        ) as nursery,
        socket.socket(socket.AF_UNIX) as control,
    ):
        assert nursery.stdout is not None
        nursery.stdout.readline()
        control.connect(str(tmp_path / "s"))
        request = {"environment": dict(os.environ), "folder": str(tmp_path), "log": str(tmp_path / "log")}
        control.sendall(json.dumps(request).encode() + b"\n")
        wait_until(lambda: (tmp_path / "pids").exists() and (tmp_path / "pids").read_text().endswith(" "))
        engine, helper = map(int, (tmp_path / "pids").read_text().split())
        assert lives(helper)
        os.kill(engine, signal.SIGSEGV)
        wait_until(lambda: not lives(engine) and not lives(helper))
        assert json.loads(control.recv(1000)[5:]) == {"is": "exit", "status": -signal.SIGSEGV}
        nursery.kill()


STRANGER = """
import json, os, socket, sys
os.setgid(65534); os.setuid(65534)
with socket.socket(socket.AF_UNIX) as stranger:
    stranger.settimeout(5)
    try:
        stranger.connect(sys.argv[1])
    except PermissionError:
        sys.exit(print("refused"))
    try:
        stranger.sendall(json.dumps({"environment": {}, "folder": "/", "log": sys.argv[2]}).encode() + b"\\n")
        print(stranger.recv(100))
    except (ConnectionResetError, BrokenPipeError):
        print(b"")
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("open_to_all", [False, True])
def test_another_user_has_nothing_run(own_raylet: Raylet, open_to_all: bool):
    path, log = start_nursery(own_raylet.home), own_raylet.home.folder / "stranger"
    if open_to_all:
        for each in (own_raylet.home.folder.parent, own_raylet.home.folder):
            each.chmod(0o711)
        path.chmod(0o666)
    output = subprocess.check_output([sys.executable, "-c", STRANGER, str(path), str(log)], cwd="/")
    if open_to_all:
        own_raylet.home.folder.parent.chmod(0o700)
    assert output == (b"b''\n" if open_to_all else b"refused\n")
    assert not log.exists()


@pytest.mark.parametrize("request_", [b"\n", b"[]\n", b"nonsense\n", b"{" * 2**20 + b"{"])
def test_a_request_that_is_none_starts_nothing(raylet: Raylet, request_: bytes):
    path = start_nursery(raylet.home)
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(5)
        client.connect(str(path))
        with contextlib.suppress(ConnectionError):
            client.sendall(request_)
            said = client.recv(1000)
            assert said == b"" or json.loads(said[5:])["is"] == "exit"
    assert nursery_pid(raylet.home)


def test_a_folder_that_another_could_have_made_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(PermissionError):
        folder = tmp_path / "f"
        folder.mkdir()
        folder.chmod(0o770)
        make_private(folder)
