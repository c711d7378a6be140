"""What the pool counts. An ingress says how each request ended, in the message that gives its lease back.

The ledger's actor does the counting, so that the figures are the whole pool's and outlive an ingress.
"""

from __future__ import annotations

from typing import NamedTuple

#: The last part of a route, by which a request's family is called in the figures.
_FAMILIES = {
    "chat/completions": "chat",
    "completions": "completions",
    "embeddings": "embeddings",
    "rerank": "rerank",
    "responses": "responses",
    "messages": "messages",
}


class Outcome(NamedTuple):
    """How one request ended, as its ingress saw it. Times are in seconds; None is what nobody knows.

    `model` is the one that answered, or the one that was asked for if none did; `status` is HTTP's, also for a stream
    that broke later than its head. `ttft_s` and `total_s` count from the request's arrival at the ingress.
    """

    model: str
    family: str
    principal: str
    priority: int
    status: int
    queue_wait_s: float | None = None
    load_wait_s: float | None = None
    ttft_s: float | None = None
    total_s: float | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None

    @property
    def tpot_s(self) -> float | None:
        """Seconds per output token after the first; None where there is no second one."""
        if self.ttft_s is None or self.total_s is None or self.output_tokens is None or self.output_tokens < 2:
            return None
        return max(0.0, self.total_s - self.ttft_s) / (self.output_tokens - 1)


def family(path: str) -> str:
    """The family of a route: `chat` for `/v1/chat/completions`; `other` for what has no name of its own."""
    route = path.strip("/").removeprefix("llm-pool/").removeprefix("v1/")
    return _FAMILIES.get(route, "other")
