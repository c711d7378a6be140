"""Engine processes that die or hang over real Serve: what their clients hear, and what goes on beside it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.pool import Pool, fake, loaded, running_pool

STEADY = {**fake(tokens_per_s=20, tokens=400), "target_inflight": 8, "min_replicas": 1}
#: A victim of its own for each test: a model whose engine dies again and again is left alone for a while.
MODELS = {
    **dict.fromkeys(("calm", "segfaults", "killed", "hangs", "left"), STEADY),
    "long": {**fake(tokens_per_s=2000, tokens=4000), "target_inflight": 2},
}


@pytest.fixture(scope="module")
def pool(port: int) -> Iterator[Pool]:
    with running_pool(port, {"models": MODELS}) as pool:
        yield pool
        pool.check()


def words(model: str, count: int) -> str:
    return "".join(f"{model}:{index} " for index in range(count))


async def read(pool: Pool, model: str, started: asyncio.Event, tokens: int, **fields: Any) -> str:
    """The text of one stream, with the message of its error event at the end if there is one."""
    text = ""
    async with pool.async_openai() as client:
        try:
            stream = await client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": "x"}],
                max_tokens=tokens,
                stream=True,
                extra_body=fields,
            )
            async for chunk in stream:
                text += chunk.choices[0].delta.content or ""
                if text:
                    started.set()
        except openai.APIError as error:
            text += f"<{error.message}>"
    return text


def engine_processes() -> dict[str, int]:
    """The process of each replica's engine, by the socket on which it listens: its name is the replica's."""
    inodes = {}
    for line in Path("/proc/net/unix").read_text().splitlines():
        _, _, _, flags, _, _, inode, *path = line.split()
        if path and "/slotpool-" in path[0] and flags == "00010000":
            inodes[f"socket:[{inode}]"] = Path(path[0]).name
    found = {}
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            name = inodes.get(os.readlink(descriptor))
            if name is not None:
                found[name] = int(descriptor.parts[2])
    return found


def replica_of(ledger: dict[str, Any], model: str) -> str:
    return loaded(ledger, model)[0]["replica"]


def is_ready(model: str) -> Any:
    return lambda ledger: ledger["models"][model]["ready"] == 1


async def begin(pool: Pool, model: str, **fields: Any) -> tuple[asyncio.Task[str], asyncio.Task[str], str, int]:
    """A stream of each model that runs; the victim's replica, and the process of its engine."""
    begun = [asyncio.Event(), asyncio.Event()]
    calm = asyncio.create_task(read(pool, "calm", begun[0], 160))
    victim = asyncio.create_task(read(pool, model, begun[1], 400, **fields))
    async with asyncio.timeout(60):
        await asyncio.gather(*(event.wait() for event in begun))
    replica = replica_of(await asyncio.to_thread(pool.ledger), model)
    return calm, victim, replica, (await asyncio.to_thread(engine_processes))[replica]


@pytest.mark.parametrize(("model", "fatal"), [("segfaults", signal.SIGSEGV), ("killed", signal.SIGKILL)])
async def test_an_engine_that_dies_costs_its_own_streams_and_no_replica(pool: Pool, model: str, fatal: signal.Signals):
    calm, victim, replica, pid = await begin(pool, model)
    os.kill(pid, fatal)
    died = time.monotonic()
    text = await victim
    assert time.monotonic() - died < 3, "its client hears at once"
    assert text.startswith(f"{model}:0 ")
    assert text.endswith(f"<the replica of {model} went away>")
    assert await read(pool, model, asyncio.Event(), 3) == words(model, 3)
    assert await calm == words("calm", 160)
    after = await asyncio.to_thread(pool.wait, is_ready(model))
    assert replica_of(after, model) == replica
    assert (await asyncio.to_thread(engine_processes))[replica] != pid


async def test_an_engine_that_hangs_costs_its_streams_their_deadline_and_is_replaced(pool: Pool):
    calm, victim, replica, pid = await begin(pool, "hangs", timeout_s=8)
    stopped = time.monotonic()
    os.kill(pid, signal.SIGSTOP)
    text = await victim
    assert time.monotonic() - stopped < 8 + 1.5
    assert text.endswith("<the request ran longer than it may>")
    assert await read(pool, "hangs", asyncio.Event(), 3) == words("hangs", 3)
    assert await calm == words("calm", 160)
    after = await asyncio.to_thread(pool.wait, is_ready("hangs"))
    assert replica_of(after, "hangs") == replica
    assert not is_alive(pid)


async def test_streams_do_not_notice_that_their_replicas_process_hangs(pool: Pool):
    calm, victim, replica, _ = await begin(pool, "left")
    (supervisor,) = processes(b"ray::ServeReplica:slotpool:left")
    os.kill(supervisor, signal.SIGSTOP)
    try:
        assert await victim == words("left", 400)
        assert await read(pool, "left", asyncio.Event(), 3) == words("left", 3)
    finally:
        os.kill(supervisor, signal.SIGCONT)
    assert await calm == words("calm", 160)
    assert replica_of(await asyncio.to_thread(pool.ledger), "left") == replica


def is_alive(pid: int) -> bool:
    return Path("/proc", str(pid)).exists()


def processes(name: bytes) -> list[int]:
    """The processes whose name begins so."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if path.read_bytes().startswith(name):
                found.append(int(path.parent.name))
    return found


def resident_mib(pids: list[int]) -> float:
    """The memory of these processes, without what they share."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            pages, shared = map(int, Path("/proc", str(pid), "statm").read_text().split()[1:3])
            total += pages - shared
    return total * os.sysconf("SC_PAGE_SIZE") / 2**20


async def test_a_client_that_reads_a_byte_a_second_costs_no_memory_and_its_lease_ends_at_its_deadline(pool: Pool):
    await read(pool, "long", asyncio.Event(), 4000)
    engine = engine_processes()[replica_of(await asyncio.to_thread(pool.ledger), "long")]
    # Those through which the stream passes; what else Ray does meanwhile is not the stream's.
    pids = [engine, *processes(b"ray::ServeReplica:slotpool:ingress"), *processes(b"ray::ServeReplica:slotpool:long")]
    before = resident_mib(pids)
    body = {"model": "long", "messages": [{"role": "user", "content": "x"}], "stream": True, "timeout_s": 15}
    address = httpx.URL(pool.url)
    asked = time.monotonic()
    reader, writer = await asyncio.open_connection(address.host, address.port, limit=1)
    content = httpx.Request("POST", pool.url, json=body).content
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(content), content)
    )
    most = 0.0
    ended = None
    while time.monotonic() < asked + 20:
        await reader.read(1)
        most = max(most, resident_mib(pids) - before)
        ledger = await asyncio.to_thread(pool.ledger)
        if ended is None and not loaded(ledger, "long")[0]["leases"]:
            ended = time.monotonic() - asked
        await asyncio.sleep(1)
    writer.close()
    assert most < 5
    assert ended is not None
    assert ended < 15 + 3


async def test_no_engine_process_is_left_over_when_its_model_is_unloaded(pool: Pool):
    replica = replica_of(await asyncio.to_thread(pool.ledger), "long")
    pid = engine_processes()[replica]
    answer = await asyncio.to_thread(httpx.post, f"{pool.url}/v1/admin/models/long/unload", timeout=60)
    assert answer.status_code == 200
    assert not is_alive(pid)
    assert replica not in engine_processes()
