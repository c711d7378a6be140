"""The narrow waist between the pool and whatever runs a model.

An engine takes a `Call` and returns a `Reply`: status, headers, a stream of bytes, and a `Report` that says what the
call took once the bytes have ended. On the OpenAI routes the body is the client's JSON object (already checked against
its schema by the routes) and the bytes are ready for the wire; on any other path body and answer are raw. An engine
knows nothing of leases, queues or Ray. It lives on one event loop and must never block it: model code runs in threads
or processes of the engine's own.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple, Protocol, runtime_checkable

#: Called with the part of the load that is done, from 0.0 to 1.0. Safe to call from any thread.
Progress = Callable[[float], None]

#: Headers of the answers to OpenAI calls.
EVENT_STREAM = {"content-type": "text/event-stream"}
JSON = {"content-type": "application/json"}


@dataclass(frozen=True, slots=True)
class Call:
    """One request on its way into an engine.

    `body` is the JSON object of the client (its `model` is what answers must echo), or the raw bytes of whatever else
    it sent; `request_id` the id of the whole request. `headers` have names in lower case. `slots` is how many
    sequences the lease allows: choices beyond it run in turns. `priority` is the request's class, 1 (high) to 3, for
    engines that have a queue of their own. `queue_wait_ms` and `load_wait_ms` say how long the request waited before
    the lease, `pool_elapsed_ms` how long ago it arrived in all; the engine copies them into the `metrics` object
    (CONTRACT section 2).
    """

    path: str
    body: dict[str, Any] | bytes
    request_id: str
    method: str = "POST"
    query: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    slots: int = 1
    priority: int = 2
    queue_wait_ms: float = 0.0
    load_wait_ms: float = 0.0
    pool_elapsed_ms: float = 0.0

    @property
    def stream(self) -> bool:
        return isinstance(self.body, dict) and bool(self.body.get("stream"))

    @property
    def json(self) -> dict[str, Any]:
        """The body where it is a JSON object, else an empty one."""
        return self.body if isinstance(self.body, dict) else {}

    def head(self) -> dict[str, Any]:
        """All but the body, as plain data."""
        head = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "body"}
        return {**head, "headers": dict(self.headers)}

    @classmethod
    def of(cls, head: Mapping[str, Any], body: dict[str, Any] | bytes) -> Call:
        """The call of a `head()` and its body; members that this version does not know are left out."""
        return cls(body=body, **_known(cls, head))


@dataclass(slots=True)
class Report:
    """What one call took, as far as the engine knows; None is what it does not.

    Times are milliseconds in the engine: `tokenize_ms` from the call's entry until its prompt is tokens, `queue_ms`
    from there until the backend begins, `backend_ms` from then to the backend's end; `ttft_ms` from the entry to the
    first token, `total_ms` from the entry to the end. `restored_tokens` are those of the cached ones that were saved by
    an earlier engine; 0 where that was looked for in vain, None where it was not. Plain data, since it travels in the
    last frame of an answer.
    """

    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    restored_tokens: int | None = None
    output_tokens: int | None = None
    ttft_ms: float | None = None
    total_ms: float | None = None
    tokenize_ms: float | None = None
    queue_ms: float | None = None
    backend_ms: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """What is known, as plain data."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """The report of an `as_dict()`; members that this version does not know are left out."""
        return cls(**_known(cls, data))


def _known(kind: type[Call] | type[Report], data: Mapping[str, Any]) -> dict[str, Any]:
    return {each.name: data[each.name] for each in fields(kind) if each.name in data}


@dataclass(slots=True)
class Reply:
    """The answer to one call. `report` is filled in when `chunks` has ended, however it ended.

    A streamed answer is whole SSE events (`data: {…}` and a blank line; several may share one bytes object, none is
    ever split) up to and including `data: [DONE]`; any other answer is a body in one or more parts. A failure on the
    way is raised by `chunks` as a `PoolError`. Closing `chunks` aborts the work between two tokens; the work does not
    begin before the first chunk is asked for, so a reply that is dropped unread costs nothing.
    """

    status: int
    headers: dict[str, str]
    chunks: AsyncGenerator[bytes, None]
    report: Report = field(default_factory=Report)


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What a loaded engine offers: its context in tokens, its OpenAI routes, and a short name for `/v1/models`.

    `url` and `pid` are those of the server that it really is in, where that is another process or machine.
    """

    context_length: int | None = None
    paths: frozenset[str] = field(default_factory=frozenset)
    format: str | None = None
    memory_mib: int | None = None
    url: str | None = None
    pid: int | None = None


class Engine(Protocol):
    async def load(self, progress: Progress) -> None:
        """Load the model. Raises `ModelUnavailable` with a clear reason and leaves nothing behind; called once."""

    def info(self) -> EngineInfo:
        """What the loaded engine offers. Does not block; valid after `load`."""

    async def call(self, call: Call) -> Reply:
        """Answer one call. Raises a `PoolError` for a refusal, before there is a reply; does not wait for tokens."""

    async def unload(self) -> None:
        """Stop the engine and free its memory. Idempotent."""


class Kept(NamedTuple):
    """What an engine that sleeps still holds of the host's memory, and of each of its devices', in MiB."""

    host_mib: int
    device_mib: int


@runtime_checkable
class Sleeper(Protocol):
    """What an engine has beside `Engine` if it can free its devices and keep its weights in the host's memory.

    It is called only while no call runs, and calls come only after `wake`.
    """

    async def sleep(self) -> Kept:
        """Free the devices' memory as far as that goes while the process lives."""

    async def wake(self, progress: Progress) -> None:
        """Be as after `load`, on the same devices. Raises `ModelUnavailable`; the process is then ended."""


@runtime_checkable
class RunsProcess(Protocol):
    """What an engine has beside `Engine` if it is really in a process that it has started."""

    async def died(self) -> str:
        """Wait until that process ends by itself; why it did, in words for an operator."""

    async def answers(self) -> bool:
        """Whether that process still does, in less time than the supervisor waits for an answer of this one."""

    async def stop(self) -> None:
        """Let that process end by itself. Whatever of it is left is killed with this process's group."""


class Saving(NamedTuple):
    """What an engine has saved: so many sequences, in so many bytes and milliseconds."""

    sequences: int
    bytes: int
    took_ms: float


@runtime_checkable
class Remembering(Protocol):
    """What an engine has beside `Engine` if conversations can outlive it."""

    def remember_in(self, places: Mapping[str, Any]) -> None:
        """Where they are kept (`kv_store.places.Places`, as plain data). Called before `load`, or not at all."""

    async def save(self) -> Saving:
        """Keep what is worth it. No call runs, and none will come: the process ends then. Bounded by the engine."""


async def once(body: bytes) -> AsyncGenerator[bytes, None]:
    """The chunks of an answer that is there already."""
    yield body
