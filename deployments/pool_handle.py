"""The pool from another job of the same Ray: chats, streams, embeddings and leases, without HTTP.

Each process that uses a `PoolHandle` gets an actor of its own (`job_gateway`), which takes leases from the ledger as an
ingress does and calls the engines directly. The first call starts it (a second or two, some 100 MB); every handle of
the process shares it, and it ends with the process: whatever that held or waited for is then free again.
"""

from __future__ import annotations

import contextlib
import threading
import uuid
from collections.abc import AsyncGenerator, Generator, Iterator, Sequence
from types import TracebackType
from typing import Any, cast

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from cluster import effects, errors
from cluster.ledger.snapshot import Snapshot
from deployments.job_gateway import Granted, JobGateway, Wanted
from deployments.openai_objects import ChatChunk, ChatCompletion, Message
from deployments.python_calls import events_of
from deployments.schemas import CHAT, EMBEDDINGS

#: How long the ledger may take to say how the pool stands, in seconds.
STATUS_S = 10.0
#: So many parts of a stream are on their way to a reader at most.
PARTS_AHEAD = 64

_lock = threading.Lock()
_gateways: dict[str, Any] = {}


class PoolHandle:
    """The pool that runs in this Ray. It holds nothing, so it can be copied, pickled, and made anew at any time.

    A model is named by its id or an alias. `fields` are those of the route's body: OpenAI's own (`temperature`,
    `max_tokens`, `tools`, …) and the pool's: `priority` ("high", "medium", "low"), `keep_alive`, `timeout_s` (seconds,
    waiting included; at most the model's `request_timeout`, which is also the default). `messages` may be one text,
    which is then the user's.

    Every call raises a `cluster.errors.PoolError` where HTTP would have answered that error: `ModelNotFound`,
    `InvalidRequest`, `QueueFull`, `BackendTimeout`, … `BackendUnavailable` also stands for a pool that is not there.
    Methods without `_async` block, and must not be called from an event loop. All may be called from several threads,
    or several at once on one event loop: whatever runs at the same time shares the engine's batch.
    """

    def chat(self, model: str, messages: str | Sequence[Message], **fields: Any) -> ChatCompletion:
        """The whole answer, once it is there."""
        return cast(ChatCompletion, _get("whole", CHAT, _chat(messages, fields, model)))

    async def chat_async(self, model: str, messages: str | Sequence[Message], **fields: Any) -> ChatCompletion:
        """As `chat`. Cancelling it frees the slot."""
        return cast(ChatCompletion, await _await("whole", CHAT, _chat(messages, fields, model)))

    def stream(self, model: str, messages: str | Sequence[Message], **fields: Any) -> Generator[ChatChunk, None, None]:
        """The answer while it is made. Closing the generator frees the slot; an error may come after some chunks."""
        return _iterate(CHAT, _chat(messages, fields, model))

    def stream_async(
        self, model: str, messages: str | Sequence[Message], **fields: Any
    ) -> AsyncGenerator[ChatChunk, None]:
        """As `stream`."""
        return _iterate_async(CHAT, _chat(messages, fields, model))

    def embed(self, model: str, texts: str | Sequence[str], **fields: Any) -> list[list[float]]:
        """One vector for each text, in their order; of one text, a list of one. At most 2048 texts at a time."""
        return _vectors(_get("whole", EMBEDDINGS, _texts(model, texts, fields)))

    async def embed_async(self, model: str, texts: str | Sequence[str], **fields: Any) -> list[list[float]]:
        """As `embed`."""
        return _vectors(await _await("whole", EMBEDDINGS, _texts(model, texts, fields)))

    def acquire(
        self,
        model: str,
        *,
        slots: int = 1,
        priority: str = "medium",
        timeout_s: float | None = None,
        hold_s: float | None = None,
    ) -> Lease:
        """A lease to hold while the caller works: `with pool.acquire("coder") as lease:`, or `async with`.

        Entering waits in the queue like any request, at most `timeout_s`; the model is loaded by then, and is neither
        unloaded nor moved while the lease is held. `slots` are clamped to what one replica has. A lease is held for at
        most `hold_s` (seconds; by default, and at most, the model's `request_timeout`), and is then taken back: others
        wait for its place. It goes back when the block is left, and when this process dies.
        """
        return Lease(Wanted(uuid.uuid4().hex, model, slots, priority, timeout_s, hold_s))

    def status(self) -> Snapshot:
        """How the pool stands: models, replicas, queues, nodes. Its `now` and all times beside it are on one clock."""
        return cast(Snapshot, _result(_ledger().status.remote(), STATUS_S))

    async def status_async(self) -> Snapshot:
        """As `status`."""
        return cast(Snapshot, await _answer(_ledger().status.remote()))


class Lease:
    """Slots of one replica, held from `with` to its end; what is said of it is there once it is entered.

    `model` answers (its id; another than was asked for, if that has a fallback), on the engine of `replica`; `node` is
    the id of its Ray node, and `devices` are the indices of its GPUs there (none for an external server). `slots` were
    leased; `hold_s` seconds are left at the grant. `url` is set where the engine is an HTTP server of its own, or an
    external one: it may be called directly, with at most `slots` requests at a time.

    Leaving the block raises `BackendTimeout` if the time was over before: the end of the work had no lease.
    """

    model: str
    replica: str
    node: str | None
    devices: tuple[int, ...]
    slots: int
    hold_s: float
    url: str | None

    def __init__(self, wanted: Wanted) -> None:
        self._wanted = wanted
        self._id = wanted.id

    def chat(self, messages: str | Sequence[Message], **fields: Any) -> ChatCompletion:
        """As the pool's `chat`, on this lease: nothing of it waits in the queue.

        More calls than slots wait for each other. Raises `BackendTimeout` when the lease's time is over.
        """
        return cast(ChatCompletion, _get("whole", CHAT, _chat(messages, fields), self._id))

    async def chat_async(self, messages: str | Sequence[Message], **fields: Any) -> ChatCompletion:
        """As `chat`."""
        return cast(ChatCompletion, await _await("whole", CHAT, _chat(messages, fields), self._id))

    def stream(self, messages: str | Sequence[Message], **fields: Any) -> Generator[ChatChunk, None, None]:
        """As the pool's `stream`, on this lease."""
        return _iterate(CHAT, _chat(messages, fields), self._id)

    def stream_async(self, messages: str | Sequence[Message], **fields: Any) -> AsyncGenerator[ChatChunk, None]:
        """As `stream`."""
        return _iterate_async(CHAT, _chat(messages, fields), self._id)

    def check(self) -> None:
        """Raises `BackendTimeout` if the time is over, `BackendUnavailable` if the replica is gone. A round trip."""
        _get("check", self._id)

    async def check_async(self) -> None:
        """As `check`."""
        await _await("check", self._id)

    def __enter__(self) -> Lease:
        try:
            self._granted(_get("hold", self._wanted))
        except BaseException:
            self._give_up()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is not None:
            self._give_up()
        elif _get("give_back", self._id):
            raise _over()

    async def __aenter__(self) -> Lease:
        try:
            self._granted(await _await("hold", self._wanted))
        except BaseException:
            self._give_up()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        if kind is not None:
            self._give_up()
        elif await _await("give_back", self._id):
            raise _over()

    def _granted(self, granted: Granted) -> None:
        self.model, self.replica, self.node = granted.model, granted.replica, granted.node
        self.devices, self.slots = granted.devices, granted.slots
        self.hold_s, self.url = granted.hold_s, granted.url

    def _give_up(self) -> None:
        """A message that no answer is waited for: what went wrong before is the news."""
        gateway = _gateways.get(_this_process())
        if gateway is not None:
            gateway.give_back.remote(self._id)


def _over() -> errors.PoolError:
    return errors.BackendTimeout("the lease's time was over before its work", phase="running")


# --- bodies -----------------------------------------------------------------------------------------------------------


def _chat(messages: str | Sequence[Message], fields: dict[str, Any], model: str | None = None) -> dict[str, Any]:
    said = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
    return {"model": model, "messages": said, **fields}


def _texts(model: str, texts: str | Sequence[str], fields: dict[str, Any]) -> dict[str, Any]:
    given = texts if isinstance(texts, str) else list(texts)
    return {"model": model, "input": given, **fields, "encoding_format": "float"}


def _vectors(answer: dict[str, Any]) -> list[list[float]]:
    return [each["embedding"] for each in sorted(answer["data"], key=lambda each: int(each["index"]))]


# --- calls ------------------------------------------------------------------------------------------------------------


def _get(method: str, *args: Any) -> Any:
    return _result(getattr(_gateway(), method).remote(*args))


async def _await(method: str, *args: Any) -> Any:
    return await _answer(getattr(_gateway(), method).remote(*args))


@contextlib.contextmanager
def _ended_with(called: Any) -> Iterator[None]:
    """Ray's errors are what they mean to the caller; a call that is not waited for any longer is cancelled."""
    try:
        yield
    except RayError as error:
        raise _translated(error) from None
    except BaseException:
        ray.cancel(called)
        raise


def _result(called: Any, timeout_s: float | None = None) -> Any:
    with _ended_with(called):
        return ray.get(called, timeout=timeout_s)


async def _answer(called: Any) -> Any:
    with _ended_with(called):
        return await effects.answer_of(called)


def _iterate(path: str, body: dict[str, Any], lease: str | None = None) -> Generator[ChatChunk, None, None]:
    parts = _parts(path, body, lease)
    with _ended_with(parts):
        for part in parts:
            for event in events_of(ray.get(part)):
                yield cast(ChatChunk, event)


async def _iterate_async(path: str, body: dict[str, Any], lease: str | None = None) -> AsyncGenerator[ChatChunk, None]:
    parts = _parts(path, body, lease)
    with _ended_with(parts):
        async for part in parts:
            for event in events_of(await effects.answer_of(part)):
                yield cast(ChatChunk, event)


def _parts(path: str, body: dict[str, Any], lease: str | None) -> Any:
    """A reader that stops reading stops the engine: nothing is sent ahead of it but so much."""
    options = {"num_returns": "streaming", "_generator_backpressure_num_objects": PARTS_AHEAD}
    return _gateway().streamed.options(**options).remote(path, body, lease)


def _gateway() -> Any:
    """The actor that this process calls the pool through. Raises `BackendUnavailable` without a pool."""
    with _lock:
        here = _this_process()
        if here not in _gateways:
            _ledger()
            _gateways.clear()
            _gateways[here] = effects.start_beside(JobGateway)
        return _gateways[here]


def _ledger() -> Any:
    try:
        return effects.find_ledger()
    except ValueError:
        raise errors.BackendUnavailable("no pool runs in this Ray", retry_after=1) from None


def _this_process() -> str:
    """This process's name in the Ray that it is connected to now. Raises `BackendUnavailable` without a connection."""
    if not ray.is_initialized():
        raise errors.BackendUnavailable("this process is not connected to Ray: ray.init() does that")
    return str(ray.get_runtime_context().get_worker_id())


def _translated(error: Exception) -> Exception:
    """What a failed call means to its caller."""
    if isinstance(error, RayTaskError):
        cause: object = error.cause
        return cause if isinstance(cause, Exception) else error
    if isinstance(error, GetTimeoutError):
        return errors.BackendUnavailable("the scheduler does not answer", retry_after=1)
    if isinstance(error, RayActorError):
        # The next call starts another.
        with _lock:
            _gateways.clear()
        return errors.BackendUnavailable("the gateway of this process went away", retry_after=1)
    return error
