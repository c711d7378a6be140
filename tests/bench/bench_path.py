"""What the way from a client to an engine and back costs, measured with an engine that costs nothing.

    python tests/bench/bench_path.py [--streams 1,4,16,64] [--rounds 3] [--proxy] [--profile FOLDER] [--json FILE]

The fake engine at 100 tokens a second, through the whole pool over real Serve and behind bare uvicorn, in one run.
CPU is that of all processes that Ray has started here, with what they do anyway (`idle`); the client's own is not in
it, though it runs on the same cores. `--proxy` measures the path through Serve's proxy instead of direct ingress,
`--profile` records each of the pool's busy processes with py-spy during the largest number of streams.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from app.cli.supervisor import adopt_orphans, descendants
from tests.bench.processes import cpu_s
from tests.pool import fake, free_port, local_serve, running_pool

ENGINE_S = 0.010
TOKENS = 400
MODELS = {
    "streamed": {"tokens_per_s": 100, "tokens": TOKENS},
    "unary": {"ttft_s": ENGINE_S, "tokens_per_s": 1e9, "tokens": 8},
}
UNARY_ONE_BY_ONE = 100
UNARY_CLIENTS = 32
UNARY_S = 4.0
SETTLE_S = 30


@dataclass
class Streams:
    """What a number of streams at once saw and cost."""

    ttft_ms: float
    cpu_us_per_token: float
    cpu_us_per_chunk: float
    chunks_per_s: float


@dataclass
class Contender:
    """A server under test: where it listens, whose CPU counts, and what was measured."""

    name: str
    port: int
    root: int
    #: Processes below `root` that are not the contender's.
    others: frozenset[int] = frozenset()
    streams: dict[int, list[Streams]] = field(default_factory=dict)
    unary_ms: list[float] = field(default_factory=list)
    rps: list[float] = field(default_factory=list)
    idle: float = 0.0

    def cpu(self) -> dict[int, float]:
        """Seconds of CPU that each of the contender's processes has used so far."""
        used = {}
        own = set() if self.root == os.getpid() else {self.root}
        for pid in own | set(descendants(self.root)) - self.others:
            with contextlib.suppress(OSError):
                used[pid] = cpu_s(pid)
        return used


def spent(before: dict[int, float], after: dict[int, float]) -> float:
    return sum(seconds - before.get(pid, 0.0) for pid, seconds in after.items())


def request(model: str, **fields: Any) -> bytes:
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "x"}], **fields}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"Content-Type: application/json\r\n\r\n" + body


async def stream(port: int, tokens: int) -> tuple[float, int]:
    """One stream, read as cheaply as Python can. Returns the time to the first token and the reads with tokens."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    started = time.perf_counter()
    writer.write(request("streamed", stream=True, max_tokens=tokens))
    first = 0.0
    events = reads = 0
    tail = b""
    while b"data: [DONE]" not in tail:
        data = await reader.read(2**16)
        assert data, "the stream was cut"
        found = data.count(b"data: {")
        if found and not first:
            first = time.perf_counter() - started
        events += found
        reads += bool(found)
        tail = tail[-16:] + data
    writer.close()
    assert events >= tokens, f"{events} events"
    return first, reads


async def streams(contender: Contender, count: int) -> Streams:
    before, started = contender.cpu(), time.perf_counter()
    ends = await asyncio.gather(*(stream(contender.port, TOKENS) for _ in range(count)))
    elapsed, cpu = time.perf_counter() - started, spent(before, contender.cpu())
    chunks = sum(reads for _, reads in ends)
    return Streams(
        ttft_ms=statistics.median(first for first, _ in ends) * 1e3,
        cpu_us_per_token=cpu / (count * TOKENS) * 1e6,
        cpu_us_per_chunk=cpu / chunks * 1e6,
        chunks_per_s=chunks / elapsed,
    )


async def unary(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> float:
    """One whole answer over a kept connection; seconds."""
    started = time.perf_counter()
    writer.write(request("unary"))
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200"), head
    length = next((line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), None)
    if length is not None:
        await reader.readexactly(int(length.partition(b":")[2]))
    else:
        while (size := int(await reader.readline(), 16)) > 0:
            await reader.readexactly(size + 2)
        await reader.readexactly(2)
    return time.perf_counter() - started


async def one_by_one(contender: Contender) -> list[float]:
    reader, writer = await asyncio.open_connection("127.0.0.1", contender.port)
    took = [await unary(reader, writer) * 1e3 for _ in range(UNARY_ONE_BY_ONE)]
    writer.close()
    return took


async def per_second(contender: Contender) -> float:
    done = 0
    until = time.perf_counter() + UNARY_S

    async def client() -> None:
        nonlocal done
        reader, writer = await asyncio.open_connection("127.0.0.1", contender.port)
        while time.perf_counter() < until:
            await unary(reader, writer)
            done += 1
        writer.close()

    await asyncio.gather(*(client() for _ in range(UNARY_CLIENTS)))
    return done / UNARY_S


@contextlib.contextmanager
def bare() -> Iterator[Contender]:
    """Uvicorn with the fake engine in a process of its own."""
    port = free_port()
    script = str(Path(__file__).with_name("bare_server.py"))
    process = subprocess.Popen([sys.executable, script, str(port), json.dumps(MODELS)])
    try:
        yield Contender("bare", port, process.pid)
    finally:
        process.terminate()
        process.wait(10)


def title_of(pid: int) -> str:
    """What a process calls itself, fit for the name of a file."""
    title = Path(f"/proc/{pid}/cmdline").read_text().partition("\0")[0]
    return re.sub(r"[^A-Za-z0-9]+", "-", title).strip("-")


async def record(contender: Contender, count: int, folder: Path) -> None:
    """Record the contender's busiest processes with py-spy while `count` streams run: folded stacks, a file each."""
    running = asyncio.ensure_future(streams(contender, count))
    before = contender.cpu()
    await asyncio.sleep(0.7)
    after = contender.cpu()
    busiest = sorted(after, key=lambda pid: after[pid] - before.get(pid, 0.0), reverse=True)[:3]
    recorders = []
    for pid in busiest:
        target = folder / f"{title_of(pid)}-{pid}.txt"
        spy = str(Path(sys.executable).with_name("py-spy"))
        command = [spy, "record", "-p", str(pid), "-d", "2", "-f", "raw", "-o", str(target), "-r", "200", "-n"]
        recorders.append(
            await asyncio.create_subprocess_exec(*command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        )
    await asyncio.gather(running, *(recorder.wait() for recorder in recorders))


async def settled(contender: Contender) -> None:
    """Wait until what the contender has started beside its answers is done. Bounded."""
    for _ in range(SETTLE_S):
        before = contender.cpu()
        await asyncio.sleep(1)
        if spent(before, contender.cpu()) < 0.25:
            return


async def measure(contenders: list[Contender], counts: list[int], rounds: int) -> None:
    for contender in contenders:
        await streams(contender, 4)
        await one_by_one(contender)
        await settled(contender)
        before = contender.cpu()
        await asyncio.sleep(3)
        contender.idle = spent(before, contender.cpu()) / 3
    for _ in range(rounds):
        for contender in contenders:
            for count in counts:
                contender.streams.setdefault(count, []).append(await streams(contender, count))
            contender.unary_ms += await one_by_one(contender)
            contender.rps.append(await per_second(contender))


def figures(pool: Contender, plain: Contender) -> dict[str, float]:
    values: dict[str, float] = {}
    for contender, prefix in ((pool, ""), (plain, "bare_")):
        for count, rows in contender.streams.items():
            for key in ("cpu_us_per_token", "cpu_us_per_chunk", "ttft_ms"):
                values[f"{prefix}{key}_{count}"] = statistics.median(getattr(row, key) for row in rows)
        values[f"{prefix}unary_overhead_ms"] = statistics.median(contender.unary_ms) - ENGINE_S * 1e3
        values[f"{prefix or 'unary_'}rps_{UNARY_CLIENTS}"] = statistics.median(contender.rps)
        values[f"{prefix}idle_cpu_percent"] = contender.idle * 100
    return {key: round(value, 2) for key, value in values.items()}


def show(values: dict[str, float], counts: list[int]) -> None:
    print(
        f"{'streams':<10}{'CPU µs/token':>14}{'µs/chunk':>10}{'TTFT ms':>10}{'bare µs/token':>16}{'bare TTFT ms':>14}"
    )
    for count in counts:
        cells = [values[f"{key}_{count}"] for key in ("cpu_us_per_token", "cpu_us_per_chunk", "ttft_ms")]
        plain = [values[f"bare_{key}_{count}"] for key in ("cpu_us_per_token", "ttft_ms")]
        print(f"{count:<10}{cells[0]:>14.0f}{cells[1]:>10.0f}{cells[2]:>10.1f}{plain[0]:>16.0f}{plain[1]:>14.1f}")
    for key in ("unary_overhead_ms", "bare_unary_overhead_ms", "unary_rps_32", "bare_rps_32", "idle_cpu_percent"):
        print(f"{key} = {values[key]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", default="1,4,16,64")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--proxy", action="store_true", help="through Serve's proxy instead of direct ingress")
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    counts = [int(count) for count in options.streams.split(",")]
    models = {name: {**fake(**keys), "target_inflight": 256, "min_replicas": 1} for name, keys in MODELS.items()}
    args = {"models": models, "queue_max_size": 1000}
    # Engine processes descend from one that has left its parent.
    adopt_orphans()
    with bare() as plain, local_serve(gpus=0, direct=not options.proxy) as port, running_pool(port, args):
        # Everything that Ray has started is below this process, and so is the bare server.
        pool = Contender("pool", port, os.getpid(), frozenset({plain.root}))
        asyncio.run(measure([pool, plain], counts, options.rounds))
        if options.profile is not None:
            options.profile.mkdir(parents=True, exist_ok=True)
            asyncio.run(record(pool, max(counts), options.profile))
    values = figures(pool, plain)
    show(values, counts)
    if options.json is not None:
        options.json.write_text(json.dumps(values, indent=2))


if __name__ == "__main__":
    main()
