"""What a conversation of 1,500 tokens costs after a swap, and what the swap costs that saves it.

    python tests/bench/bench_remember.py [--rounds 5] [--threads N] [--llama-server PATH] [--json FILE]

Two models, SmolLM2 twice, share one logical GPU behind Slotpool over HTTP. Each round has a conversation of its own:
its first turn on a loaded model (`ttft_cold_ms`), a short request for the other model, so that this one saves it and
goes (`swap_with_save_ms`, request to first token), a short request that brings this one back, and the second turn
(`ttft_restored_ms`; `restored_share` of its prompt came from the store). Then the same swap from a model that holds
nothing worth saving (`swap_without_ms`). `save_ms` and `restore_ms` are of the engine alone, in a process of its own.
Where llama-server is at hand, its router does the same with the same file beside it (`router`), which keeps nothing
across a swap. All figures are medians of the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai

sys.path.insert(0, str(Path(__file__).parents[2]))

from deployments.nursery import SPINS
from deployments.weights import resolve_weights
from tests.bench.race_llama_server import llama_router
from tests.pool import SMOLLM2, local_serve, running_pool

SLOTS, CONTEXT = 4, 2048
WORDS = ["sea", "wind", "stone", "river", "light", "house", "green", "small", "old", "bread", "road", "bird", "cloud"]
#: Each is about one token.
LENGTH = 1450
SHORT = [{"role": "user", "content": "Say hello."}]
#: Between two requests, so that no lease of the one holds up the other's swap.
PAUSE_S = 0.3

Messages = list[dict[str, str]]


def conversation(seed: str) -> Messages:
    chosen = random.Random(seed)
    text = " ".join(chosen.choice(WORDS) for _ in range(LENGTH))
    return [{"role": "user", "content": f"Remember these words: {text}. What is the first one?"}]


class Client:
    """Streams over HTTP, one at a time."""

    def __init__(self, url: str) -> None:
        self._openai = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600)

    def turn(self, model: str, messages: Messages, tokens: int = 1) -> tuple[float, str, float]:
        """Milliseconds to the first token, the text, and how much of the prompt was cached."""
        time.sleep(PAUSE_S)
        given: Any = messages
        started = time.perf_counter()
        stream = self._openai.chat.completions.create(
            model=model,
            messages=given,
            max_tokens=tokens,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        first_ms, text, share = 0.0, "", 0.0
        for chunk in stream:
            said = chunk.choices[0].delta.content if chunk.choices else None
            if said:
                first_ms = first_ms or (time.perf_counter() - started) * 1e3
                text += said
            if chunk.usage is not None:
                details = chunk.usage.prompt_tokens_details
                share = ((details and details.cached_tokens) or 0) / chunk.usage.prompt_tokens
        assert first_ms, f"{model} said nothing"
        return first_ms, text, share


def one_round(client: Client, seed: str, note: Callable[[str, float], None]) -> None:
    first = conversation(seed)
    client.turn("a", SHORT)
    cold_ms, text, _ = client.turn("a", first, 16)
    note("ttft_cold_ms", cold_ms)
    note("swap_with_save_ms", client.turn("b", SHORT)[0])
    client.turn("a", SHORT)
    second = [*first, {"role": "assistant", "content": text}, {"role": "user", "content": "And the second one?"}]
    again_ms, _, share = client.turn("a", second, 16)
    note("ttft_restored_ms", again_ms)
    note("restored_share", share)
    client.turn("b", SHORT)
    client.turn("a", SHORT)
    note("swap_without_ms", client.turn("b", SHORT)[0])


def measure(url: str, rounds: int, name: str) -> dict[str, float]:
    client = Client(url)
    found: dict[str, list[float]] = defaultdict(list)
    client.turn("b", SHORT)
    for number in range(rounds):
        one_round(client, f"{name} {number}", lambda key, value: found[key].append(value))
        print(name, {key: round(values[-1], 3) for key, values in found.items()}, flush=True)
    return {key: statistics.median(values) for key, values in found.items()}


def bare(rounds: int, threads: int, answer: Any) -> None:
    """What it takes an engine to save one sequence and to restore it, without anything around it."""
    answer.send(asyncio.run(_bare(rounds, threads)))


async def _bare(rounds: int, threads: int) -> dict[str, float]:
    from contextlib import aclosing

    from deployments.engines.llama_cpp.engine import LlamaCppEngine
    from deployments.engines.protocol import Call
    from deployments.kv_store.places import Places

    found: dict[str, list[float]] = defaultdict(list)
    for number in range(rounds):
        with tempfile.TemporaryDirectory(prefix="sp-kv-", dir="/dev/shm") as folder:
            for turn in ("save", "restore"):
                engine = LlamaCppEngine(
                    resolve_weights(SMOLLM2), model_id="a", slots=SLOTS, n_ctx=CONTEXT, n_threads=threads
                )
                engine.remember_in(Places(folder, 1 << 30).as_dict())
                await engine.load(lambda _: None)
                body = {"messages": conversation(f"bare {number}"), "max_tokens": 1, "temperature": 0}
                reply = await engine.call(Call("/v1/chat/completions", body, "r"))
                async with aclosing(reply.chunks) as chunks:
                    async for _ in chunks:
                        pass
                report = reply.report
                if turn == "save":
                    found["save_ms"].append((await engine.save()).took_ms)
                else:
                    assert report.restored_tokens
                    assert report.ttft_ms is not None
                    # One token is evaluated again; tokenizing is in it, too.
                    found["restore_ms"].append(report.ttft_ms)
                await engine.unload()
    return {key: statistics.median(values) for key, values in found.items()}


def in_own_process(rounds: int, threads: int) -> dict[str, float]:
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=bare, args=(rounds, threads, theirs))
    process.start()
    theirs.close()
    try:
        found: dict[str, float] = ours.recv()
    finally:
        process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of either engine")
    parser.add_argument("--llama-server", default=shutil.which("llama-server"), help="default: the one on the PATH")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    values: dict[str, Any] = in_own_process(options.rounds, options.threads)
    kwargs = {"n_threads": options.threads}
    model = {"model_path": SMOLLM2, "gguf_n_ctx": CONTEXT, "target_inflight": SLOTS, "engine_kwargs": kwargs}
    models = {name: {**model, "num_gpus": 1, "idle_timeout": 0} for name in ("a", "b")}
    with local_serve(gpus=1) as port, running_pool(port, {"models": models, "max_asleep": "auto"}) as pool:
        values |= measure(pool.url, options.rounds, "slotpool")
        pool.check()
    values["restored_over_cold"] = values["ttft_restored_ms"] / values["ttft_cold_ms"]
    values["router"] = None
    if options.llama_server:
        files = {name: resolve_weights(SMOLLM2) for name in ("a", "b")}
        with llama_router(options.llama_server, files, options.threads, SLOTS, CONTEXT) as url:
            values["router"] = measure(url, options.rounds, "router")
    for key, value in values.items():
        print(f"{key} = {value if isinstance(value, dict | None) else round(value, 3)}")
    if options.json is not None:
        options.json.write_text(json.dumps(values, indent=2))


if __name__ == "__main__":
    main()
