"""The narrow waist between the pool and whatever runs a model.

An engine speaks the OpenAI wire format: it takes a request body as a client sent it (already checked for its
schema by the routes) and yields ready-made bytes. It knows nothing of leases, queues or Ray. It lives on one
event loop and must never block it: model code runs in threads or processes of the engine's own.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

#: Called with the part of the load that is done, from 0.0 to 1.0. Safe to call from any thread.
Progress = Callable[[float], None]


@dataclass(frozen=True, slots=True)
class Call:
    """One inference request on its way into an engine.

    `path` is the OpenAI route (`/v1/chat/completions` or `/v1/completions`), `body` the JSON object of the client
    (its `model` is what answers must echo), `request_id` the id of the whole request. `queue_wait_ms` and
    `load_wait_ms` say how long it waited before the lease, `pool_elapsed_ms` how long ago it arrived in all; the
    engine copies them into the `metrics` object (CONTRACT section 2).
    """

    path: str
    body: dict[str, Any]
    request_id: str
    queue_wait_ms: float = 0.0
    load_wait_ms: float = 0.0
    pool_elapsed_ms: float = 0.0

    @property
    def stream(self) -> bool:
        return bool(self.body.get("stream"))


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What a loaded engine offers: its context in tokens, its OpenAI routes, and a short name for `/v1/models`."""

    context_length: int | None = None
    paths: frozenset[str] = field(default_factory=frozenset)
    format: str | None = None
    memory_mib: int | None = None


class Engine(Protocol):
    async def load(self, progress: Progress) -> None:
        """Load the model. Raises `ModelUnavailable` with a clear reason and leaves nothing behind; called once."""

    def info(self) -> EngineInfo:
        """What the loaded engine offers. Does not block; valid after `load`."""

    def generate(self, call: Call) -> AsyncIterator[bytes]:
        """Answer one call.

        With `stream`, yields whole SSE events (`data: {…}` and a blank line; several may share one bytes object,
        none is ever split) up to and including `data: [DONE]`. Without, yields exactly one JSON body. A refusal is
        raised as a `PoolError` before the first item; a later failure is raised as a `PoolError` too, and the host
        turns it into an error event. Closing the iterator aborts the work between two tokens.
        """

    async def unload(self) -> None:
        """Stop the engine and free its memory. Idempotent."""
