"""What a load test sends: how much of what, and when. The same seed gives the same requests."""

from __future__ import annotations

import random
from dataclasses import dataclass

#: Plain words, of which most models have one token each.
WORDS = (
    "time",
    "way",
    "year",
    "work",
    "day",
    "man",
    "world",
    "life",
    "part",
    "house",
    "place",
    "week",
    "night",
    "city",
)


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """Bounds and shape of a load test. Whichever of `requests` and `duration_s` is reached first ends it.

    `concurrency` clients send one request after the other; with `rate` (requests a second) each waits until its time
    has come, at random intervals. Prompts have about `prompt_tokens` tokens and differ from each other, so that no
    cache of prompts flatters the figures; answers have at most `max_tokens`.
    """

    model: str
    requests: int
    concurrency: int
    duration_s: float
    prompt_tokens: int
    max_tokens: int
    seed: int
    rate: float | None = None
    timeout_s: float = 300.0

    def prompts(self) -> list[str]:
        """One prompt for each request."""
        chance = random.Random(self.seed)
        return [
            f"Request {chance.randrange(10**6)}. Write a story with these words: "
            + " ".join(chance.choices(WORDS, k=max(1, self.prompt_tokens - 20)))
            for _ in range(self.requests)
        ]

    def starts(self) -> list[float]:
        """When each request may be sent at the earliest, in seconds from the beginning."""
        if self.rate is None:
            return [0.0] * self.requests
        chance, at, starts = random.Random(self.seed + 1), 0.0, []
        for _ in range(self.requests):
            starts.append(at)
            at += chance.expovariate(self.rate)
        return starts
