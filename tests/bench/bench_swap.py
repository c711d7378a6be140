"""What a swap takes: two models, idle, that share one device; from a request through HTTP to its first token.

    python tests/bench/bench_swap.py [--swaps 30] [--max-asleep auto] [--fake] [--json FILE]

SmolLM2 twice, 8 slots of 1,024 tokens, on one logical GPU, asked in turn, with a pause in between. `bare_load_s` is
what llama.cpp takes to load the same file in a process that has imported it. The first swap is the first for its
replica, too. The timeline is of the swap that took the median time, in seconds since its request: the ledger's change
log, and what the engine says of the call. What all processes of the pool hold is measured after the first 30 swaps and
after the last; `held_memory_ratio` is the one over the other.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from deployments.nursery import SPINS
from tests.bench.processes import Held, held_by_pool
from tests.pool import Pool, fake, local_serve, running_pool, smollm2

SLOTS, CONTEXT = 8, 1024
BARE_LOADS = 7
#: After so many swaps everything that a swap leaves behind once is there.
WARM = 30
PAUSE_S = 0.3


def bare_loads(answer: Any) -> None:
    """How long each of some loads takes in this process, in seconds."""
    from deployments.engines.llama_cpp.engine import LlamaCppEngine
    from deployments.weights import resolve_weights
    from tests.pool import SMOLLM2

    async def load() -> float:
        engine = LlamaCppEngine(resolve_weights(SMOLLM2), model_id="bare", slots=SLOTS, n_ctx=CONTEXT)
        started = time.perf_counter()
        await engine.load(lambda _: None)
        took = time.perf_counter() - started
        await engine.unload()
        return took

    answer.send([asyncio.run(load()) for _ in range(BARE_LOADS)])


def bare_load_s() -> float:
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=bare_loads, args=(theirs,))
    process.start()
    theirs.close()
    try:
        times: list[float] = ours.recv()
    finally:
        process.join()
    return statistics.median(times)


def first_token_s(pool: Pool, model: str) -> tuple[float, dict[str, Any]]:
    """From a request to its first token, in seconds, and the `metrics` object of its last chunk, if there is one."""
    started = time.perf_counter()
    messages: Any = [{"role": "user", "content": "Say hello."}]
    answer = pool.openai().chat.completions.create(model=model, messages=messages, max_tokens=1, stream=True)
    took = None
    metrics: dict[str, Any] = {}
    for chunk in answer:
        if took is None and chunk.choices and chunk.choices[0].delta.content:
            took = time.perf_counter() - started
        metrics = (chunk.model_extra or {}).get("metrics") or metrics
    assert took is not None, "no token came"
    return took, metrics


def engine_steps(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """What the engine did with the call, in seconds since it came to the pool."""
    if not metrics:
        return []
    called = metrics["pool_total_wall_ms"] - metrics["engine_total_wall_ms"]
    tokens = called + metrics["engine_tokenize_ms"]
    evaluated = tokens + metrics["gpu_time_to_first_token_ms"]
    steps = {"the ledger has granted": called, "the prompt is tokens": tokens, "the prompt is evaluated": evaluated}
    return [{"at_s": round(at_ms / 1e3, 4), "cause": cause} for cause, at_ms in steps.items()]


class Timeline:
    """The ledger's change log, as far as it is about replicas and loads."""

    def __init__(self) -> None:
        import ray

        from cluster import effects

        self._ray, self._ledger = ray, effects.find_ledger()
        self._epoch, self._version = "", -1
        self.since(0.0)

    def since(self, asked_at: float) -> list[dict[str, Any]]:
        """What happened since this was asked last, with the seconds since `asked_at` (seconds since 1970)."""
        steps: list[dict[str, Any]] = []
        while True:
            told = self._ray.get(self._ledger.changes.remote(self._epoch, self._version, 0.0))
            self._epoch, self._version = told.epoch, told.version
            for change in told.changes:
                if change.kind in ("replica", "swap") or (change.kind == "load" and change.data["progress"] == 0.0):
                    known = {key: change.data[key] for key in ("from", "to", "cause") if key in change.data}
                    steps.append({"at_s": round(change.time - asked_at, 4), "model": change.model, **known})
            if not told.changes:
                return steps


def measure(pool: Pool, swaps: int, stays: bool) -> dict[str, Any]:
    first_token_s(pool, "one")
    if stays:
        # Its process is started when all is quiet, before anybody asks for it.
        pool.wait(lambda ledger: any(row["model"] == "two" and row["replica"] for row in ledger["replicas"]))
        pool.wait(lambda ledger: ledger["leases"] == 0)
        time.sleep(PAUSE_S)
    first_swap_s, _ = first_token_s(pool, "two")
    timeline = Timeline()
    took: list[float] = []
    steps: list[list[dict[str, Any]]] = []
    after: dict[str, Held] = {}
    for swap in range(swaps):
        pool.wait(lambda ledger: ledger["leases"] == 0)
        time.sleep(PAUSE_S)
        timeline.since(0.0)
        asked_at = time.time()
        first_s, metrics = first_token_s(pool, ("one", "two")[swap % 2])
        took.append(first_s)
        pool.wait(lambda ledger: ledger["leases"] == 0)
        told = [*timeline.since(asked_at), *engine_steps(metrics)]
        steps.append([*told, {"at_s": round(first_s, 4), "cause": "the client has the first token"}])
        if swap + 1 in (min(WARM, swaps), swaps):
            time.sleep(PAUSE_S)
            after["first" if swap + 1 < swaps else "last"] = held_by_pool(os.getpid())
    median = sorted(range(swaps), key=took.__getitem__)[(swaps - 1) // 2]
    return {
        "swaps": swaps,
        "swap_s": statistics.median(took),
        "swap_p90_s": sorted(took)[min(swaps - 1, int(swaps * 0.9))],
        "swap_max_s": max(took),
        "first_swap_s": first_swap_s,
        "held": {when: asdict(each) for when, each in after.items()},
        "held_memory_ratio": after["last"].memory_mib / after["first"].memory_mib if "first" in after else None,
        "timeline": steps[median],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swaps", type=int, default=30)
    parser.add_argument("--max-asleep", default="auto", help="as in the configuration; 0 = replicas end")
    parser.add_argument("--fake", action="store_true", help="engines that load in no time, to see what is not the load")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    asleep = options.max_asleep if options.max_asleep == "auto" else int(options.max_asleep)
    model = fake(tokens=1) if options.fake else smollm2(gguf_n_ctx=CONTEXT)
    models = {name: {**model, "num_gpus": 1, "target_inflight": SLOTS, "idle_timeout": 0} for name in ("one", "two")}
    bare_s = 0.0 if options.fake else bare_load_s()
    with local_serve(gpus=1) as port, running_pool(port, {"models": models, "max_asleep": asleep}) as pool:
        found = measure(pool, options.swaps, asleep != 0)
        pool.check()
    values = {
        **found,
        "bare_load_s": bare_s,
        "swap_over_bare_load_s": found["swap_s"] - bare_s,
        "first_swap_over_bare_load_s": found["first_swap_s"] - bare_s,
    }
    values = {key: round(value, 4) if isinstance(value, float) else value for key, value in values.items()}
    for step in values["timeline"]:
        print(
            f"{step['at_s']:8.3f}  {step.get('model', ''):5} {step.get('from', ''):10} "
            f"{step.get('to', ''):10} {step.get('cause', '')}"
        )
    for key, value in values.items():
        if key != "timeline":
            print(f"{key} = {value}")
    if options.json is not None:
        options.json.write_text(json.dumps(values, indent=2))


if __name__ == "__main__":
    main()
