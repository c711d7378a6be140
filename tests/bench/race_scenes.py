"""The scenes of the race with llama-server: what is asked when, and what its clients saw.

All are open loops: a request is sent when its time has come, however late earlier answers are. The same seed gives the
same requests. In four scenes arrivals are a Poisson process of two models, and every request is a completion with a
prompt of its own. `flood` is a minute of overlapping chats with one model, and visitors who want the other.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import random
import statistics
import time
from dataclasses import dataclass
from typing import Any

import aiohttp

from tests.bench.bench_llama_cpp import chat_body

OFTEN, RARE = "often", "rare"
CHAT_TOKENS = 96
#: When the visitors of a flood come, and how long they may wait by their priority, in seconds.
VISITS_S = (3.0, 3.2, 3.4, 3.6, 3.8, 4.0)
MAX_WAIT_S = {"low": 20, "medium": 17, "high": 14}
#: What a single request may take before it counts as failed, in seconds.
PATIENCE_S = 120.0


@dataclass(frozen=True, slots=True)
class Scene:
    """Arrivals of a Poisson process: so many a second, such a share of them for `often` and the others for `rare`."""

    rate: float
    share: float


SCENES = {
    "mixed": Scene(2.0, 0.5),
    "busy": Scene(4.0, 0.5),
    "rare": Scene(2.0, 0.93),
    "calm": Scene(0.5, 0.5),
}
FLOOD = "flood"


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request, and when it is sent. `path` is that of its route."""

    at_s: float
    model: str
    body: dict[str, Any]
    path: str = "/v1/completions"


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a request. `ttft_s` is None where no text came, `error` where nothing was said to be wrong.

    Times count from the moment at which it should have been sent. `cut`: its stream ended before its time.
    """

    model: str
    at_s: float
    ttft_s: float | None
    took_s: float
    error: str | None
    cut: bool

    @property
    def is_whole(self) -> bool:
        return self.error is None and not self.cut and self.ttft_s is not None


def poisson(scene: Scene, seed: int, requests: int, tokens: int) -> list[Arrival]:
    """So many completions of so many tokens; the order of the draws is part of what a seed means."""
    rng = random.Random(seed)
    arrivals, at_s = [], 0.0
    for _ in range(requests):
        at_s += rng.expovariate(scene.rate)
        model = OFTEN if rng.random() < scene.share else RARE
        body = {
            "model": model,
            "prompt": f"{rng.random()} Once upon a time there was",
            "max_tokens": tokens,
            "stream": True,
            "temperature": 0,
            "ignore_eos": True,
        }
        arrivals.append(Arrival(at_s, model, body))
    return arrivals


def chat(rng: random.Random, at_s: float, model: str, priority: str = "medium") -> Arrival:
    """One streamed chat of about 45 prompt tokens."""
    body = {"model": model, "priority": priority, **chat_body(rng, stream=True, tokens=CHAT_TOKENS)}
    return Arrival(at_s, model, body, "/v1/chat/completions")


def flood(seed: int, seconds: float, every: float) -> list[Arrival]:
    """A chat with `often` about every so many seconds, and after three seconds six visitors of all priorities."""
    rng = random.Random(seed)
    times = [(at_s, RARE, priority) for at_s, priority in zip(VISITS_S, itertools.cycle(MAX_WAIT_S), strict=False)]
    at_s = 0.0
    while at_s < seconds:
        times.append((at_s, OFTEN, "medium"))
        at_s += every * rng.uniform(0.95, 1.05)
    return [chat(rng, *each) for each in sorted(times)]


async def send(session: aiohttp.ClientSession, url: str, arrival: Arrival, started: float) -> Result:
    """Send one request at its time and read its stream to the end."""
    due = started + arrival.at_s
    await asyncio.sleep(max(0.0, due - time.perf_counter()))
    first = error = None
    done = False
    try:
        async with session.post(f"{url}{arrival.path}", json=arrival.body) as answer:
            if answer.status != 200:
                error = f"{answer.status}: {(await answer.text())[:200]}"
            else:
                async for line in answer.content:
                    done = done or line.strip() == b"data: [DONE]"
                    if line.startswith(b"data: {"):
                        event = json.loads(line[6:])
                        error = error or (str(event["error"])[:200] if "error" in event else None)
                        if first is None and any(_text(choice) for choice in event.get("choices") or ()):
                            first = time.perf_counter() - due
    except (aiohttp.ClientError, TimeoutError) as failure:
        error = f"{type(failure).__name__}: {failure}"
    return Result(arrival.model, arrival.at_s, first, time.perf_counter() - due, error, error is None and not done)


def _text(choice: dict[str, Any]) -> str | None:
    return choice.get("text") or (choice.get("delta") or {}).get("content")


async def play(session: aiohttp.ClientSession, url: str, arrivals: list[Arrival]) -> list[Result]:
    """All requests of a scene, each at its time."""
    started = time.perf_counter()
    return await asyncio.gather(*(send(session, url, arrival, started) for arrival in arrivals))


def quantile(values: list[float], share: float) -> float | None:
    """The smallest value that at least `share` of all do not exceed."""
    return sorted(values)[math.ceil(share * len(values)) - 1] if values else None


def figures(results: list[Result]) -> dict[str, Any]:
    """What is told of one scene with one contender, in seconds; only whole answers count in the times.

    The makespan reaches from the first possible arrival to the last answer's end.
    """
    whole = [result for result in results if result.is_whole]
    firsts = [result.ttft_s for result in whole if result.ttft_s is not None]
    rare = [result.ttft_s for result in whole if result.ttft_s is not None and result.model == RARE]
    return {
        "makespan_s": max(result.at_s + result.took_s for result in results),
        "e2e_mean_s": statistics.mean(result.took_s for result in whole) if whole else None,
        "ttft_p50_s": quantile(firsts, 0.5),
        "ttft_p95_s": quantile(firsts, 0.95),
        "rare_ttft_p95_s": quantile(rare, 0.95),
        "failed": sum(result.error is not None for result in results),
        "cut": sum(result.cut for result in results),
    }


def together(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Of several runs: the median of each time, and how many requests failed or were cut in all of them."""
    told: dict[str, Any] = {}
    for key in runs[0]:
        known = [run[key] for run in runs if run[key] is not None]
        if key in ("failed", "cut"):
            told[key] = sum(known)
        else:
            told[key] = statistics.median(known) if known else None
    return {**told, "runs": runs}
