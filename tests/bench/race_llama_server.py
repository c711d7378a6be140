"""A race on one GPU between Slotpool and llama-server: two models that do not fit together, asked in turn and at once.

    python tests/bench/race_llama_server.py [--llama-server PATH] [--scenes mixed busy rare calm flood] [--seeds 1 2 3]
        [--n 40] [--tokens 48] [--rate R --share S] [--seconds 60] [--every S] [--json FILE]

Slotpool runs as a user's pool does, over Ray Serve on loopback, with one logical GPU and two models that want all of
it. llama-server runs in router mode with `--models-max 1`. Both have the same two files (SmolLM2-135M as 16-bit floats
in a temporary folder, and as it comes, with 4 bits), threads, slots and context. They take turns, seed by seed, since
they would share the same cores; each plays every scene (`race_scenes.py`) of a seed in one life, and is left alone for
a while before the first.

In `mixed`, `busy`, `rare` and `calm`, `--n` completions of `--tokens` tokens arrive at random; `--rate` and `--share`
make a scene `own` of the kind. In `flood`, chats arrive for `--seconds`: some 90 % of them for `often`, the next one
always before the last one could be done if it had the machine to itself, and after three seconds six for `rare`, of all
priorities. Slotpool promises a place within 14, 17 and 20 seconds, by priority; the router knows no such thing and
swaps when it is idle.

The time to first token counts from the moment at which the request should have been sent, so waiting for a swap is in
it. A request fails when it is answered with an error, and is cut when its stream ends before its time. The table shows
the median of the seeds, and their range.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import aiohttp

sys.path.insert(0, str(Path(__file__).parents[2]))

from deployments.weights import resolve_weights
from tests.bench import race_scenes
from tests.bench.bench_llama_cpp import llama_server
from tests.bench.race_scenes import FLOOD, MAX_WAIT_S, OFTEN, PATIENCE_S, RARE, SCENES, Arrival, Result, Scene
from tests.pool import SMOLLM2, local_serve, requantised, running_pool

SLOTS = 8
CONTEXT = 1024
#: From one request for `often` to the next in a flood, as a part of the time that one takes alone.
OVERLAP = 0.75
#: How long both are left alone after they have answered for both models, in seconds.
REST_S = 10.0

#: What was seen, by scene and contender: one list of figures with an entry per seed.
Seen = dict[str, dict[str, list[dict[str, Any]]]]


async def prepared(session: aiohttp.ClientSession, url: str, every: float | None) -> float:
    """The time between two arrivals for `often` in a flood, which is measured here unless it is given.

    Both models answer once before, so that their files are in memory; `often` is loaded.
    """

    async def alone(model: str) -> float:
        (result,) = await race_scenes.play(session, url, [race_scenes.chat(random.Random(model), 0.0, model)])
        assert result.is_whole, f"{model} does not answer: {result}"
        return result.took_s

    for model in (OFTEN, RARE, OFTEN):
        await alone(model)
    await asyncio.sleep(REST_S)
    return OVERLAP * statistics.median([await alone(OFTEN) for _ in range(5)]) if every is None else every


async def play(
    url: str, scenes: dict[str, Callable[[float], list[Arrival]]], every: float | None
) -> tuple[dict[str, list[Result]], float]:
    """The answers in each scene, and the time between two arrivals for `often` in a flood."""
    timeout = aiohttp.ClientTimeout(total=PATIENCE_S)
    # llama-server closes idle connections under the feet of a client that would use them again.
    connector = aiohttp.TCPConnector(force_close=True, limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        every = await prepared(session, url, every)
        return {name: await race_scenes.play(session, url, plan(every)) for name, plan in scenes.items()}, every


@contextlib.contextmanager
def slotpool(files: dict[str, str], threads: int) -> Iterator[str]:
    common = {"num_gpus": 1, "target_inflight": SLOTS, "gguf_n_ctx": CONTEXT, "engine_kwargs": {"n_threads": threads}}
    models = {name: {"model_path": path, **common} for name, path in files.items()}
    with local_serve(gpus=1) as port, running_pool(port, {"models": models, "max_wait_s": MAX_WAIT_S}) as pool:
        yield pool.url


@contextlib.contextmanager
def llama_router(
    binary: str, files: dict[str, str], threads: int, slots: int = SLOTS, context: int = CONTEXT
) -> Iterator[str]:
    """llama-server as a router over the files, with room for one of them."""
    with tempfile.TemporaryDirectory(prefix="sp-race-") as folder:
        sections = [
            f"[{name}]\nmodel = {path}\nparallel = {slots}\nctx-size = {slots * context}\n"
            f"threads = {threads}\nthreads-batch = {threads}\n"
            for name, path in files.items()
        ]
        preset = Path(folder, "models.ini")
        preset.write_text("version = 1\n\n" + "\n".join(sections))
        with llama_server(binary, "--models-max", "1", "--models-preset", str(preset)) as url:
            yield url


def plans(arguments: argparse.Namespace, seed: int) -> dict[str, Callable[[float], list[Arrival]]]:
    """What is sent in each scene; a flood depends on how long a request takes alone."""
    found: dict[str, Callable[[float], list[Arrival]]] = {}
    scenes = {name: SCENES.get(name) for name in arguments.scenes}
    if arguments.rate is not None:
        scenes = {"own": Scene(arguments.rate, arguments.share)}
    for name, scene in scenes.items():
        if scene is None:
            found[name] = lambda every: race_scenes.flood(seed, arguments.seconds, every)
        else:
            arrivals = race_scenes.poisson(scene, seed, arguments.n, arguments.tokens)
            found[name] = lambda _, arrivals=arrivals: arrivals  # type: ignore[misc]
    return found


def race(arguments: argparse.Namespace, contenders: dict[str, Callable[[], AbstractContextManager[str]]]) -> Seen:
    """Every contender plays every scene with every seed; who begins changes from seed to seed."""
    seen: Seen = defaultdict(lambda: defaultdict(list))
    every = arguments.every
    for turn, seed in enumerate(arguments.seeds):
        names = list(contenders) if turn % 2 == 0 else list(contenders)[::-1]
        for name in names:
            with contenders[name]() as url:
                answers, every = asyncio.run(play(url, plans(arguments, seed), every))
            for scene, results in answers.items():
                seen[scene][name].append(race_scenes.figures(results))
                for result in (each for each in results if not each.is_whole):
                    said = result.error or "the stream ended before its time"
                    print(f"{scene}, seed {seed}, {name}: {result.model} at {result.at_s:.1f} s: {said}"[:300])
            print(f"seed {seed}: {name} has played {', '.join(answers)}", flush=True)
    return seen


def show(seen: Seen) -> None:
    """Median and range of each figure."""
    for scene, rows in seen.items():
        columns = list(next(iter(rows.values()))[0])
        print(f"\n{scene:<14}" + "".join(f"{column:>22}" for column in columns))
        for name, runs in rows.items():
            cells = []
            for column in columns:
                known = sorted(run[column] for run in runs if run[column] is not None)
                if column in ("failed", "cut"):
                    cells.append(str(sum(known)))
                elif known:
                    cells.append(f"{statistics.median(known):.2f} ({known[0]:.2f}-{known[-1]:.2f})")
                else:
                    cells.append("-")
            print(f"{name:<14}" + "".join(f"{cell:>22}" for cell in cells), flush=True)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-server", help="llama.cpp's server binary; default: the one on the PATH")
    parser.add_argument("--scenes", nargs="+", choices=[*SCENES, FLOOD], default=[*SCENES, FLOOD])
    parser.add_argument("--seeds", "--seed", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--n", type=int, default=40, help="requests of a scene")
    parser.add_argument("--tokens", type=int, default=48, help="new tokens of each")
    parser.add_argument("--rate", type=float, help="requests per second of a scene of your own, in place of the others")
    parser.add_argument("--share", type=float, default=0.5, help="which part of them is for the first model")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long requests arrive in a flood")
    parser.add_argument("--every", type=float, help="seconds between two requests for the frequent model of a flood")
    parser.add_argument("--threads", type=int, help="of either engine; default: all cores")
    parser.add_argument("--only", choices=["slotpool", "llama_server"], help="one contender alone")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    arguments = parsed()
    binary = arguments.llama_server or shutil.which("llama-server")
    if not binary and arguments.only != "slotpool":
        sys.exit("llama-server is not on the PATH: give --llama-server PATH")
    threads = arguments.threads or len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="sp-weights-") as folder:
        files = {OFTEN: requantised(folder, "F16"), RARE: resolve_weights(SMOLLM2)}
        contenders: dict[str, Callable[[], AbstractContextManager[str]]] = {
            "llama_server": lambda: llama_router(str(binary), files, threads),
            "slotpool": lambda: slotpool(files, threads),
        }
        seen = race(arguments, {name: each for name, each in contenders.items() if arguments.only in (None, name)})
    show(seen)
    if arguments.json:
        told = {
            scene: {name: race_scenes.together(runs) for name, runs in rows.items()} for scene, rows in seen.items()
        }
        arguments.json.write_text(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
