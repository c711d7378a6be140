"""Tokens per second and time to first token of one model: the bare engine, the whole pool, and others beside them.

    python tests/bench/bench_llama_cpp.py [--concurrency 1,4,8,16] [--rounds 3] [--llama-server PATH] [--json FILE]

In one run and in turn, so that whatever else the machine does hits all of them alike: `engine` is ours in this
process, `process` the same in one of its own, over the link, `http` the pool over Ray Serve on loopback, `Llama` the
high-level object of llama-cpp-python, one request after another, and `llama-server` llama.cpp's own server where a
binary is given. Same file, threads, slots and context. Every request is a chat of about 45 prompt tokens whose words
are drawn at random, so that no cache helps beyond the template's own beginning, and makes 64 new tokens, greedy, past
any end-of-sequence token.

What an idle pool adds to the time to first token is some milliseconds beside a prefill ten times as long, so it is
measured apart: short answers of the engine and of the pool in turn, one at a time, over a connection that is kept as
OpenAI's clients keep theirs; the difference of the medians.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import json
import multiprocessing
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiohttp
import httpx

sys.path.insert(0, str(Path(__file__).parents[2]))

from cluster.config import ModelConfig
from cluster.home import home_of
from cluster.orders import Address
from deployments.engine_child import EngineChild
from deployments.engines.llama_cpp.engine import LlamaCppEngine
from deployments.engines.protocol import Call
from deployments.link import Answer, Leased, Links
from deployments.weights import resolve_weights
from tests.pool import SMOLLM2, free_port, local_serve, running_pool, smollm2

NEW_TOKENS = 64
IDLE_PAIRS = 40
SLOTS = 16
CONTEXT = 1024
WORDS = str.split(
    "river mountain window garden paper machine coffee bridge winter music forest letter engine harbor silver planet "
    "market shadow bottle carpet ladder pencil rocket island castle desert farmer dancer hammer ticket violin walnut"
)


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement. `ttft_ms` is the median time to the first token, from the request's start."""

    name: str
    concurrency: int
    requests: int
    tokens: int
    seconds: float
    ttft_ms: float

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


def chat_body(rng: random.Random, *, stream: bool, tokens: int = NEW_TOKENS) -> dict[str, Any]:
    """A fresh chat request of about 45 prompt tokens, SmolLM2's own system text included."""
    words = " ".join(rng.choices(WORDS, k=10))
    return {
        "messages": [{"role": "user", "content": f"Tell a story with: {words}"}],
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": stream,
        "stream_options": {"include_usage": True},
    }


#: Streams the answer to a chat body as bytes, in whatever pieces they come.
Target = Callable[[dict[str, Any]], AsyncIterator[bytes]]

TEXT = re.compile(rb'"content":\s?"[^"]')
COUNT = re.compile(rb'"completion_tokens":\s?(\d+)')


async def measure(name: str, target: Target, concurrency: int, requests: int, seed: str) -> Row:
    """Keep `concurrency` streams running until `requests` are answered."""
    rng = random.Random(seed)
    left = iter(range(requests))
    firsts: list[float] = []
    tokens = 0

    async def client() -> None:
        nonlocal tokens
        for _ in left:
            began = time.perf_counter()
            first = None
            tail = b""
            async for chunk in target(chat_body(rng, stream=True)):
                if first is None and TEXT.search(chunk):
                    first = time.perf_counter() - began
                    firsts.append(first)
                tail = (tail + chunk)[-4000:]
            # The usage stands in the last events of every stream.
            counts = COUNT.findall(tail)
            assert first is not None, "an answer without text"
            assert counts, "an answer without its usage"
            tokens += int(counts[-1])

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(concurrency)))
    seconds = time.perf_counter() - started
    return Row(name, concurrency, requests, tokens, seconds, statistics.median(firsts) * 1e3)


async def measure_idle(targets: dict[str, Target], seed: int) -> dict[str, float]:
    """The median time to first token in milliseconds of each target, one request at a time, the targets in turn."""
    rng = random.Random(f"{seed} idle")
    firsts: dict[str, list[float]] = {name: [] for name in targets}
    for number in range(IDLE_PAIRS * len(targets)):
        # Neither has always the same one before it.
        turn = number % len(targets) if number // len(targets) % 2 else -1 - number % len(targets)
        name = list(targets)[turn]
        began = time.perf_counter()
        first = None
        async for chunk in targets[name](chat_body(rng, stream=True, tokens=8)):
            if first is None and TEXT.search(chunk):
                first = time.perf_counter() - began
        assert first is not None, "an answer without text"
        firsts[name].append(first)
    return {name: statistics.median(times) * 1e3 for name, times in firsts.items()}


def in_process(engine: LlamaCppEngine) -> Target:
    async def stream(body: dict[str, Any]) -> AsyncIterator[bytes]:
        reply = await engine.call(Call("/v1/chat/completions", {"model": "smollm2", **body}, "bench"))
        async with contextlib.aclosing(reply.chunks) as chunks:
            async for chunk in chunks:
                yield chunk

    return stream


@contextlib.asynccontextmanager
async def in_own_process(threads: int) -> AsyncIterator[Target]:
    """The same engine as replicas run it: a child of the machine's nursery, reached over its socket."""
    home = await asyncio.to_thread(home_of, os.getpid())
    settings = smollm2(engine_kwargs={"n_threads": threads}, target_inflight=SLOTS, gguf_n_ctx=CONTEXT)
    order = {
        "model": "smollm2",
        "replica": "bench",
        "config": ModelConfig.model_validate(settings).model_dump(mode="json", by_alias=False),
        "overrides": {},
        "unix": str(home.folder / "bench"),
        "host": "",
        "token": "",
    }
    child = await EngineChild.fork(home, dict(os.environ), home.folder / "bench.log")
    links = Links("here")
    try:
        await child.load(order, lambda fraction: None)

        async def stream(body: dict[str, Any]) -> AsyncIterator[bytes]:
            call = Call("/v1/chat/completions", {"model": "smollm2", **body}, "bench")
            way = await links.call(Address("here", order["unix"]), Leased("bench", "bench", 1, 600.0, call))
            try:
                answer = Answer(way)
                await answer.begin()
                async for chunk in answer.chunks():
                    yield chunk
            finally:
                way.close()

        yield stream
    finally:
        links.close()
        child.kill()
        await child.ended


def over_http(session: aiohttp.ClientSession, url: str) -> Target:
    async def stream(body: dict[str, Any]) -> AsyncIterator[bytes]:
        async with session.post(f"{url}/v1/chat/completions", json={"model": "smollm2", **body}) as answer:
            assert answer.status == 200, await answer.text()
            async for chunk in answer.content.iter_any():
                yield chunk

    return stream


@functools.cache
def llama_object(model: str, threads: int) -> Any:
    """llama-cpp-python's own object, loaded once in the process that asks."""
    from llama_cpp import Llama

    return Llama(model, n_ctx=CONTEXT, n_threads=threads, n_threads_batch=threads, verbose=False)


def measure_llama(model: str, threads: int, requests: int, seed: int) -> Row:
    """`Llama.create_chat_completion`, one request after another, streamed.

    For a process of its own: two engines in one have more OpenMP threads than there are cores, and slow each other.
    """
    llama = llama_object(model, threads)
    rng = random.Random(seed)
    ignored = {llama.token_eos(): -100.0}
    firsts: list[float] = []
    tokens = 0
    started = time.perf_counter()
    for _ in range(requests):
        began = time.perf_counter()
        body = chat_body(rng, stream=True)
        pieces = llama.create_chat_completion(
            body["messages"], max_tokens=NEW_TOKENS, temperature=0.0, stream=True, logit_bias=ignored
        )
        for number, _piece in enumerate(pieces):
            if number == 1:
                firsts.append(time.perf_counter() - began)
        tokens += llama.n_tokens - len(llama.tokenize(b"", add_bos=False))
        tokens -= _prompt_length(llama, body)
    seconds = time.perf_counter() - started
    return Row("Llama", 1, requests, tokens, seconds, statistics.median(firsts) * 1e3)


def _prompt_length(llama: Any, body: dict[str, Any]) -> int:
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    formatter = Jinja2ChatFormatter(llama.metadata["tokenizer.chat_template"], eos_token="", bos_token="")
    text = formatter(messages=body["messages"]).prompt
    # The last sampled token is never evaluated, so it is missing from `n_tokens`.
    return len(llama.tokenize(text.encode(), add_bos=False, special=True)) - 1


@contextlib.contextmanager
def llama_server(binary: str, *options: str) -> Iterator[str]:
    """llama.cpp's own server on loopback, until the end of the block."""
    port = free_port()
    command = [binary, "--host", "127.0.0.1", "--port", str(port), "--no-webui", *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            assert time.monotonic() < deadline, "llama-server did not start"
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait()


async def compare(
    arguments: argparse.Namespace, urls: dict[str, str], threads: int
) -> tuple[list[Row], dict[str, float]]:
    model = resolve_weights(SMOLLM2)
    engine = LlamaCppEngine(model, model_id="smollm2", slots=SLOTS, n_ctx=CONTEXT, n_threads=threads)
    await engine.load(lambda fraction: None)
    rows: list[Row] = []
    # llama-server closes idle connections under the feet of a client that would use them again.
    other = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    loop = asyncio.get_running_loop()
    async with (
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session,
        in_own_process(threads) as process,
    ):
        served = {name: over_http(session, url) for name, url in urls.items()}
        targets = {"engine": in_process(engine), "process": process, **served}
        for target in targets.values():
            await measure("warm-up", target, 2, 2, "warm-up")
        for number in range(arguments.rounds):
            for level in [int(level) for level in arguments.concurrency.split(",")]:
                seed = arguments.seed + 1000 * number + level
                for name, target in targets.items():
                    # Other random words for each, since one of them must not warm a cache of another.
                    rows.append(await measure(name, target, level, max(6, 2 * level), f"{seed} {name}"))
                    show(rows[-1])
            rows.append(await loop.run_in_executor(other, measure_llama, model, threads, 4, arguments.seed + number))
            show(rows[-1])
    other.shutdown()
    async with aiohttp.ClientSession() as kept:
        both = {"engine": in_process(engine), "http": over_http(kept, urls["http"])}
        idle = await measure_idle(both, arguments.seed)
    await engine.unload()
    return rows, idle


def run(arguments: argparse.Namespace) -> tuple[list[Row], dict[str, float]]:
    threads = arguments.threads or len(os.sched_getaffinity(0))
    kwargs = {"engine_kwargs": {"n_threads": threads}, "target_inflight": SLOTS, "gguf_n_ctx": CONTEXT, "enabled": True}
    binary = arguments.llama_server or shutil.which("llama-server")
    with contextlib.ExitStack() as stack:
        port = stack.enter_context(local_serve())
        pool = stack.enter_context(running_pool(port, {"models": {"smollm2": smollm2(**kwargs)}}))
        urls = {"http": pool.url}
        if binary:
            # The same slots, and the same context in each.
            sizes = ["-np", str(SLOTS), "-c", str(SLOTS * CONTEXT), "-t", str(threads), "-tb", str(threads)]
            server = llama_server(binary, "-m", resolve_weights(SMOLLM2), *sizes)
            urls["llama-server"] = stack.enter_context(server)
        return asyncio.run(compare(arguments, urls, threads))


def show(row: Row) -> None:
    print(f"{row.name:<14}{row.concurrency:>4}{row.tokens_per_s:>10.1f} tok/s{row.ttft_ms:>9.1f} ms TTFT", flush=True)


def summarize(rows: list[Row], idle: dict[str, float]) -> dict[str, Any]:
    """Medians over the rounds, printed as a table, with the ratios that matter."""
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.name, row.concurrency), []).append(row)
    speed = {key: statistics.median(row.tokens_per_s for row in group) for key, group in groups.items()}
    ttft = {key: statistics.median(row.ttft_ms for row in group) for key, group in groups.items()}
    names = list(dict.fromkeys(name for name, _ in groups))
    print(f"\n{'streams':<10}" + "".join(f"{name + ' tok/s':>20}{'TTFT ms':>10}" for name in names))
    for level in sorted({level for _, level in groups}):
        cells = [
            f"{speed[name, level]:>20.1f}{ttft[name, level]:>10.1f}" if (name, level) in speed else " " * 30
            for name in names
        ]
        print(f"{level:<10}" + "".join(cells))
    figures: dict[str, Any] = {}
    if ("engine", 8) in speed:
        figures["engine_8_over_llama"] = speed["engine", 8] / speed["Llama", 1]
        figures["engine_8"], figures["engine_process_8"] = speed["engine", 8], speed["process", 8]
        figures["engine_process_over_engine"] = speed["process", 8] / speed["engine", 8]
        figures["http_8_over_engine_8"] = speed["http", 8] / speed["engine", 8]
    figures["http_ttft_minus_engine_ttft_ms"] = idle["http"] - idle["engine"]
    print("idle TTFT: " + ", ".join(f"{name} {ms:.1f} ms" for name, ms in idle.items()))
    for name, value in figures.items():
        print(f"{name} = {value:.2f}")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrency", default="1,4,8,16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of every engine; default: all cores")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--llama-server", help="llama.cpp's server binary; default: the one on the PATH, if any")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows, idle = run(arguments)
    figures = summarize(rows, idle)
    if arguments.json:
        table = [{**asdict(row), "tokens_per_s": row.tokens_per_s} for row in rows]
        arguments.json.write_text(json.dumps({**figures, "idle_ttft_ms": idle, "table": table}, indent=1))


if __name__ == "__main__":
    main()
