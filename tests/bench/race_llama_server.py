"""A race on one GPU: a minute of overlapping streams on one model, and a visitor who wants the other.

    python tests/bench/race_llama_server.py [--llama-server PATH] [--seconds 60] [--every S] [--json FILE]

Slotpool runs as a user's pool does, over Ray Serve on loopback, with one logical GPU and two models that want all of
it. llama-server runs in router mode with `--models-max 1`. Both have the same two files (SmolLM2-135M as 16-bit floats
in a temporary folder, and as it comes, with 4 bits), threads, slots and context. One after the other, since they would
share the same cores, each answers the same seeded list of requests that arrive when they arrive, however late the
earlier ones are (an open loop): some 90 % of them for `often`, the next one always before the last one could be done
if it had the machine to itself, and after three seconds six for `rare`, of all priorities. Every request streams a
chat of about 45 prompt tokens, greedy, past any end-of-sequence token. Slotpool promises a place within 14, 17 and 20
seconds, by priority; the router knows no such thing and swaps when it is idle.

The time to first token counts from the moment at which the request should have been sent, so waiting for a swap is in
it. A request fails when it is answered with an error, or when its stream ends before its time. The makespan reaches
from the first arrival to the last answer's end.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import math
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiohttp

sys.path.insert(0, str(Path(__file__).parents[2]))

from deployments.weights import resolve_weights
from tests.bench.bench_llama_cpp import TEXT, chat_body, llama_server
from tests.pool import SMOLLM2, local_serve, requantised, running_pool

NEW_TOKENS = 96
SLOTS = 8
CONTEXT = 1024
OFTEN, RARE = "often", "rare"
#: When the visitors come, and how long they may wait by their priority, in seconds.
VISITS_S = (3.0, 3.2, 3.4, 3.6, 3.8, 4.0)
MAX_WAIT_S = {"low": 20, "medium": 17, "high": 14}
#: From one request for `often` to the next, as a part of the time that one takes alone.
OVERLAP = 0.75
#: How long both are left alone after they have answered for both models, in seconds.
REST_S = 10.0
#: What a single request may take before it counts as failed, in seconds.
PATIENCE_S = 120.0


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of the workload, and when it is sent."""

    at_s: float
    model: str
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a request; `ttft_s` is None where no text came, `error` where nothing went wrong."""

    model: str
    at_s: float
    ttft_s: float | None
    end_s: float
    error: str | None


def workload(seed: int, seconds: float, every: float) -> list[Arrival]:
    """A request for `often` about every so many seconds, and the visitors; the same for the same seed."""
    rng = random.Random(seed)
    times = [(at_s, RARE, priority) for at_s, priority in zip(VISITS_S, itertools.cycle(MAX_WAIT_S), strict=False)]
    at_s = 0.0
    while at_s < seconds:
        times.append((at_s, OFTEN, "medium"))
        at_s += every * rng.uniform(0.95, 1.05)
    arrivals = []
    for at_s, model, priority in sorted(times):
        body = chat_body(rng, stream=True, tokens=NEW_TOKENS)
        arrivals.append(Arrival(at_s, model, {"model": model, "priority": priority, **body}))
    return arrivals


async def request(session: aiohttp.ClientSession, url: str, arrival: Arrival, started: float) -> Result:
    """Send one request at its time and read its stream to the end."""
    await asyncio.sleep(max(0.0, started + arrival.at_s - time.perf_counter()))
    first = error = None
    tail = b""
    try:
        async with session.post(f"{url}/v1/chat/completions", json=arrival.body) as answer:
            async for chunk in answer.content.iter_any():
                tail = (tail + chunk)[-4000:]
                if first is None and TEXT.search(tail):
                    first = time.perf_counter() - started - arrival.at_s
        if answer.status != 200:
            error = f"{answer.status}: {tail.decode(errors='replace')}"
        elif b"[DONE]" not in tail or first is None or b'"error"' in tail:
            error = f"the stream broke off: {tail[-200:].decode(errors='replace')}"
    except (aiohttp.ClientError, TimeoutError) as failure:
        error = f"{type(failure).__name__}: {failure}"
    return Result(arrival.model, arrival.at_s, first, time.perf_counter() - started, error)


async def race(url: str, seed: int, seconds: float, every: float | None) -> tuple[list[Result], float]:
    """All answers, and the time between two arrivals for `often`, which is measured here unless it is given.

    Both models answer once before, so that their files are in memory; `often` is loaded.
    """
    timeout = aiohttp.ClientTimeout(total=PATIENCE_S)
    # llama-server closes idle connections under the feet of a client that would use them again.
    connector = aiohttp.TCPConnector(force_close=True, limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:

        async def alone(model: str) -> float:
            body = {"model": model, **chat_body(random.Random(model), stream=True, tokens=NEW_TOKENS)}
            result = await request(session, url, Arrival(0.0, model, body), time.perf_counter())
            assert result.error is None, f"{model} does not answer: {result.error}"
            return result.end_s

        for model in (OFTEN, RARE, OFTEN):
            await alone(model)
        await asyncio.sleep(REST_S)
        if every is None:
            every = OVERLAP * statistics.median([await alone(OFTEN) for _ in range(5)])
        arrivals = workload(seed, seconds, every)
        started = time.perf_counter()
        results = await asyncio.gather(*(request(session, url, arrival, started) for arrival in arrivals))
        return results, every


@contextlib.contextmanager
def slotpool(files: dict[str, str], threads: int) -> Iterator[str]:
    common = {"num_gpus": 1, "target_inflight": SLOTS, "gguf_n_ctx": CONTEXT, "engine_kwargs": {"n_threads": threads}}
    models = {name: {"model_path": path, **common} for name, path in files.items()}
    with local_serve(gpus=1) as port, running_pool(port, {"models": models, "max_wait_s": MAX_WAIT_S}) as pool:
        yield pool.url


@contextlib.contextmanager
def llama_router(binary: str, files: dict[str, str], threads: int) -> Iterator[str]:
    """llama-server as a router over the files, with room for one of them."""
    with tempfile.TemporaryDirectory(prefix="sp-race-") as folder:
        sections = [
            f"[{name}]\nmodel = {path}\nparallel = {SLOTS}\nctx-size = {SLOTS * CONTEXT}\n"
            f"threads = {threads}\nthreads-batch = {threads}\n"
            for name, path in files.items()
        ]
        preset = Path(folder, "models.ini")
        preset.write_text("version = 1\n\n" + "\n".join(sections))
        with llama_server(binary, "--models-max", "1", "--models-preset", str(preset)) as url:
            yield url


def quantile(values: list[float], share: float) -> float | None:
    """The smallest value that at least `share` of all do not exceed."""
    return sorted(values)[math.ceil(share * len(values)) - 1] if values else None


def figures(results: list[Result]) -> dict[str, Any]:
    """What the table shows of one contender."""
    firsts = [result.ttft_s for result in results if result.ttft_s is not None]
    rare = [result.ttft_s for result in results if result.ttft_s is not None and result.model == RARE]
    return {
        "makespan_s": max(result.end_s for result in results),
        "failed": sum(result.error is not None for result in results),
        "ttft_p50_s": quantile(firsts, 0.5),
        "ttft_p95_s": quantile(firsts, 0.95),
        "rare_ttft_p50_s": quantile(rare, 0.5),
        "rare_ttft_p95_s": quantile(rare, 0.95),
    }


def show(table: dict[str, dict[str, Any]]) -> None:
    columns = list(next(iter(table.values())))
    print(f"{'':<14}" + "".join(f"{column:>17}" for column in columns))
    for name, row in table.items():
        cells = [
            "-" if value is None else f"{value:.2f}" if isinstance(value, float) else value for value in row.values()
        ]
        print(f"{name:<14}" + "".join(f"{cell:>17}" for cell in cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-server", help="llama.cpp's server binary; default: the one on the PATH")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long requests arrive")
    parser.add_argument("--every", type=float, help="seconds between two requests for the frequent model")
    parser.add_argument("--threads", type=int, help="of either engine; default: all cores")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=["slotpool", "llama_server"], help="one contender alone")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    binary = arguments.llama_server or shutil.which("llama-server")
    if not binary and arguments.only != "slotpool":
        sys.exit("llama-server is not on the PATH: give --llama-server PATH")
    threads = arguments.threads or len(os.sched_getaffinity(0))
    every = arguments.every
    results: dict[str, list[Result]] = {}
    with tempfile.TemporaryDirectory(prefix="sp-weights-") as folder:
        files = {OFTEN: requantised(folder, "F16"), RARE: resolve_weights(SMOLLM2)}
        contenders = {
            "llama_server": lambda: llama_router(str(binary), files, threads),
            "slotpool": lambda: slotpool(files, threads),
        }
        for name, contender in contenders.items():
            if arguments.only in (None, name):
                with contender() as url:
                    results[name], every = asyncio.run(race(url, arguments.seed, arguments.seconds, every))
    print(f"{len(next(iter(results.values())))} requests, one for {OFTEN} every {every:.2f} s")
    for name, answers in results.items():
        for result in answers:
            if result.error is not None:
                print(f"{name}: {result.model} at {result.at_s:.1f} s failed: {result.error}"[:300])
    table = {name: figures(answers) for name, answers in results.items()}
    show(table)
    if arguments.json:
        requests = {name: [asdict(result) for result in answers] for name, answers in results.items()}
        arguments.json.write_text(json.dumps({**table, "every_s": every, "requests": requests}, indent=1))


if __name__ == "__main__":
    main()
