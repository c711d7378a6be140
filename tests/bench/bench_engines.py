"""What the pool costs each engine: tokens per second and time to first token, bare and through the pool.

    python tests/bench/bench_engines.py [--engines llama_cpp,ctranslate2] [--concurrency 1,8,16] [--json FILE]

For each engine that is installed, in one run: `bare` is the engine by itself, called in a process of its own, `pool`
the same model behind HTTP, the ledger and a replica, on loopback. Both are measured in turn, so that whatever else the
machine does hits them alike, with the requests of `bench_llama_cpp.py`. The figure that counts is the pool's rate over
the bare one's at 16 streams; both are medians over the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import aiohttp

sys.path.insert(0, str(Path(__file__).parents[2]))

from cluster.config import ModelConfig
from deployments.engines.protocol import Call
from deployments.engines.registry import build_engine
from deployments.nursery import ENVIRONMENT
from deployments.weights import resolve_weights
from tests.bench.bench_llama_cpp import Row, measure, over_http, show
from tests.contract.engines import ENGINES
from tests.contract.entry import Entry
from tests.pool import local_serve, running_pool

SLOTS = 16
MODEL = "smollm2"


def installed() -> list[str]:
    """The engines that run a language model in the pool's own processes, and are there."""
    return [
        entry.name
        for entry in ENGINES.values()
        if entry.writes and all(importlib.util.find_spec(name) is not None for name in entry.needs)
    ]


def settings_of(entry: Entry, folder: Path) -> dict[str, Any]:
    """The model with a slot for each stream."""
    return {**entry.model(folder), "target_inflight": SLOTS}


async def serve_bare(settings: dict[str, Any]) -> None:
    """Measure the engine in this process, once for each line of standard input; a row for each on standard output."""
    config = ModelConfig.model_validate(settings)
    path = resolve_weights(config.model_path, in_folder=config.in_folder)
    engine = build_engine(MODEL, config, path)
    await engine.load(lambda fraction: None)

    async def stream(body: dict[str, Any]) -> AsyncIterator[bytes]:
        reply = await engine.call(Call("/v1/chat/completions", {"model": MODEL, **body}, "bench"))
        async with contextlib.aclosing(reply.chunks) as chunks:
            async for chunk in chunks:
                yield chunk

    while line := await asyncio.to_thread(sys.stdin.readline):
        row = await measure("bare", stream, **json.loads(line))
        print(json.dumps(asdict(row)), flush=True)


class Bare:
    """The engine by itself, in a process of the interpreter that its model names."""

    def __init__(self, settings: dict[str, Any]) -> None:
        python = settings.get("python") or sys.executable
        given = {key: value for key, value in settings.items() if key != "python"}
        self._process = subprocess.Popen(
            [python, __file__, "--bare", json.dumps(given)],
            env={**os.environ, **ENVIRONMENT},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    async def measure(self, **fields: Any) -> Row:
        return await asyncio.to_thread(self._ask, fields)

    def close(self) -> None:
        """End the process, and wait for it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        finally:
            self._process.kill()

    def _ask(self, fields: dict[str, Any]) -> Row:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(fields) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the bare engine has ended"
        return Row(**json.loads(answer))


async def compare(url: str, bare: Bare, levels: list[int], rounds: int) -> list[Row]:
    rows = []
    async with aiohttp.ClientSession() as session:
        pool = over_http(session, url)
        await bare.measure(concurrency=2, requests=2, seed="warm-up")
        await measure("pool", pool, 2, 2, "warm-up")
        for number in range(rounds):
            for level in levels:
                requests = max(6, 2 * level)
                # Other random words for each, and the one that begins takes turns.
                one = bare.measure(concurrency=level, requests=requests, seed=f"{number} {level} bare")
                other = measure("pool", pool, level, requests, f"{number} {level} pool")
                for each in (one, other) if number % 2 == 0 else (other, one):
                    rows.append(await each)
                    show(rows[-1])
    return rows


@contextlib.contextmanager
def started(settings: dict[str, Any]) -> Iterator[Bare]:
    bare = Bare(settings)
    try:
        yield bare
    finally:
        bare.close()


def summarize(engine: str, rows: list[Row]) -> list[dict[str, Any]]:
    """A line for each number of streams, printed and returned."""
    lines = []
    for level in sorted({row.concurrency for row in rows}):
        here = [row for row in rows if row.concurrency == level]
        found = {name: [row for row in here if row.name == name] for name in ("bare", "pool")}
        rate = {name: statistics.median(row.tokens_per_s for row in each) for name, each in found.items()}
        first = {name: statistics.median(row.ttft_ms for row in each) for name, each in found.items()}
        lines.append(
            {
                "engine": engine,
                "streams": level,
                **{f"{name}_tokens_per_s": value for name, value in rate.items()},
                **{f"{name}_ttft_ms": value for name, value in first.items()},
                "pool_over_bare": rate["pool"] / rate["bare"],
            }
        )
        print(
            f"{engine:<14}{level:>4}  bare {rate['bare']:>7.1f} tok/s {first['bare']:>8.1f} ms"
            f"   pool {rate['pool']:>7.1f} tok/s {first['pool']:>8.1f} ms   pool/bare {rate['pool'] / rate['bare']:.2f}"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", help="names, separated by commas; default: all that are installed")
    parser.add_argument("--concurrency", default="1,8,16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--bare", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.bare:
        return asyncio.run(serve_bare(json.loads(arguments.bare)))
    names = arguments.engines.split(",") if arguments.engines else installed()
    levels = [int(level) for level in arguments.concurrency.split(",")]
    table: list[dict[str, Any]] = []
    with local_serve() as port, tempfile.TemporaryDirectory() as folder:
        for name in names:
            settings = settings_of(ENGINES[name], Path(folder))
            models = {MODEL: {**settings, "enabled": True}}
            with running_pool(port, {"models": models}) as pool, started(settings) as bare:
                rows = asyncio.run(compare(pool.url, bare, levels, arguments.rounds))
            table += summarize(name, rows)
    if arguments.json:
        arguments.json.write_text(json.dumps({"table": table}, indent=1))


if __name__ == "__main__":
    main()
