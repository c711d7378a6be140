"""The scheduler as a library: external servers as slots, without HTTP of its own beyond the manifests, without Ray.

    pool = ServerPool(["http://127.0.0.1:1234", ServerConfig("http://other:11434", max_concurrent=2)])
    await pool.refresh_all_manifests()
    url = await ConcurrentDispatcher(pool).submit("some-model", timeout=30.0)
    try:
        ...  # call url
    finally:
        pool.release_server(url)

The same pure ledger decides as in the whole pool, so the same rules hold: a server that loads models just in time is
never handed another model while it runs one, whoever waits is served in turn, and a slot is freed exactly once. Every
method may be called from any thread.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from cluster.ledger.events import (
    ConfigChanged,
    Event,
    Grant,
    LeaseReleased,
    Reject,
    RequestArrived,
    RequestCancelled,
    ServerManifest,
    Ticked,
)
from cluster.ledger.ledger import Ledger
from cluster.ledger.snapshot import ServerRow
from cluster.ledger.specs import PoolSpec, ServerSpec
from cluster.servers.types import loads_just_in_time

logger = logging.getLogger("slotpool.servers")

#: A deadline for those who set none, in seconds: the ledger wants one of everybody.
NEVER_S = 1e9
#: Nobody is refused here because too many wait: every waiter is a task of the caller's own.
UNBOUNDED = 10**9


class NoModelsAvailableError(RuntimeError):
    """No server offers any model: none can be reached, or no manifest was read yet."""


class ModelNotAvailableError(ValueError):
    """No server that can be reached offers this model."""


class DispatcherTimeoutError(TimeoutError):
    """No slot came free in time."""


@dataclass
class ServerConfig:
    """One server: how to use it, and, once it is in a `ServerPool`, how it stands there.

    `server_type` says whether it can run several models at once (`vllm`, `sglang`, `llama_server`, …); any other is
    taken to load models just in time. `api_key_env` names the environment variable that holds its key.
    """

    url: str
    max_concurrent: int = 1
    api_key_env: str | None = None
    server_type: str | None = None
    _row: Callable[[], ServerRow] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.max_concurrent < 1:
            raise ValueError("max_concurrent must be at least 1")

    def _state(self) -> ServerRow:
        return ServerRow(self.url) if self._row is None else self._row()

    @property
    def available_models(self) -> list[str]:
        """What it offers; nothing while its manifest cannot be read."""
        return list(self._state().available_models)

    @property
    def active_requests(self) -> int:
        return self._state().active_requests

    @property
    def current_model(self) -> str | None:
        """The model of the requests in flight; None without any."""
        return self._state().current_model

    @property
    def is_busy(self) -> bool:
        """All of its slots are taken."""
        return self._state().is_busy

    @property
    def last_refresh_error(self) -> str | None:
        """Why it serves nothing; None if it does."""
        return self._state().last_refresh_error

    def spec(self) -> ServerSpec:
        return ServerSpec(self.url, self.max_concurrent, loads_just_in_time(self.server_type), self.api_key_env)


class Slot(str):
    """The URL of a server, and the one lease that it stands for: released twice, it frees nobody else's slot.

    `str(slot)` is the slot itself, so it is the same lease. Only a text that was put together anew names none.
    """

    grant: Grant

    def __str__(self) -> str:
        return self

    @classmethod
    def of(cls, grant: Grant) -> Slot:
        slot = cls(grant.replica)
        slot.grant = grant
        return slot


class ServerPool:
    """Servers with their slots and models. `servers` maps each URL, as it was given, to its `ServerConfig`.

    `patience_s` is how long requests for the model that a server runs may pass one that waits for another of its
    models; then the server is left to run empty. Until then an empty server goes to whoever came first. Where all
    wait longer than that, a model keeps the server for `turn_s`: to swap for every request would serve nobody.
    """

    def __init__(
        self,
        urls: Iterable[str | ServerConfig] = (),
        *,
        max_concurrent: int = 1,
        patience_s: float = 1.0,
        turn_s: float = 10.0,
    ) -> None:
        self.servers: dict[str, ServerConfig] = {}
        for each in urls:
            server = ServerConfig(each, max_concurrent) if isinstance(each, str) else dataclasses.replace(each)
            server._row = self._row_of(server.url)
            self.servers[server.url] = server
        self._spec = PoolSpec(
            queue_max_size=UNBOUNDED,
            bound_s=(patience_s, patience_s, patience_s),
            server_batch_s=0.0,
            server_turn_s=turn_s,
            servers=tuple(server.spec() for server in self.servers.values()),
        )
        self._lock = threading.RLock()
        self._ledger = Ledger(self._spec, epoch="library", now=time.monotonic())
        self._names = itertools.count(1)
        self._takers: dict[str, Callable[[Grant | Reject], None]] = {}
        self._held: dict[str, Grant] = {}

    def __repr__(self) -> str:
        rows = self._ledger.snapshot().servers
        used = ", ".join(f"{row.url} {row.active_requests}/{row.max_concurrent}" for row in rows)
        return f"<ServerPool {used or 'empty'}>"

    # --- manifests ----------------------------------------------------------------------------------------------

    async def refresh_all_manifests(self) -> None:
        """Read what every server offers, all at once. A server that fails has its reason in `last_refresh_error`."""
        # Only whoever reads manifests needs an HTTP client.
        import httpx

        from cluster.servers.manifests import ManifestError, read_manifest

        async def refresh(client: httpx.AsyncClient, server: ServerSpec) -> None:
            try:
                self._post(ServerManifest(server.url, await read_manifest(client, server)))
            except ManifestError as error:
                self._post(ServerManifest(server.url, None, str(error)))

        async with httpx.AsyncClient() as client:
            await asyncio.gather(*(refresh(client, server) for server in self._spec.servers))

    def report_server_error(self, url: str, error: object) -> None:
        """A server failed: it gets nothing until its manifest was read again. What runs there keeps its slots."""
        self._post(ServerManifest(str(url), None, str(error) or type(error).__name__))

    def get_all_available_models(self) -> set[str]:
        """What the servers that can be reached offer, together."""
        with self._lock:
            return {name for row in self._ledger.snapshot().servers for name in row.available_models}

    # --- slots --------------------------------------------------------------------------------------------------

    def find_and_acquire(self, model: str) -> str | None:
        """A slot for a model now, or None; never waits, and passes nobody who does.

        The least loaded server first, ties in turn. The slot is taken until `release_server` gets the result.
        """
        with self._lock:
            answers: list[Grant | Reject] = []
            request = self._ask(model, None, answers.append)
            if not answers:
                self._withdraw(request)
            return Slot.of(answers[0]) if answers and isinstance(answers[0], Grant) else None

    def release_server(self, url: str) -> None:
        """Give a slot back. What is not held any more is logged and changes nothing.

        The very object that was handed out names its own lease; an equal text names the oldest lease of that server.
        """
        with self._lock:
            grant: Grant | None
            if isinstance(url, Slot):
                grant = self._held.get(url.grant.request)
            else:
                grant = next((each for each in self._held.values() if each.replica == url), None)
            if grant is None:
                logger.warning("release of %s ignored: no such slot is taken", url)
                return
            del self._held[grant.request]
            self._post(LeaseReleased(grant.request, grant.generation))

    def set_max_concurrent(self, n: int) -> None:
        """Change the slots of every server, at once for the free ones; what runs is not cut."""
        if n < 1:
            raise ValueError("max_concurrent must be at least 1")
        with self._lock:
            for server in self.servers.values():
                server.max_concurrent = n
            specs = tuple(server.spec() for server in self.servers.values())
            self._spec = dataclasses.replace(self._spec, servers=specs)
            self._post(ConfigChanged(self._spec))

    # --- inside -------------------------------------------------------------------------------------------------

    def _row_of(self, url: str) -> Callable[[], ServerRow]:
        def row() -> ServerRow:
            with self._lock:
                rows = self._ledger.snapshot().servers
            return next(each for each in rows if each.url == url)

        return row

    def _ask(self, model: str, timeout_s: float | None, taker: Callable[[Grant | Reject], None]) -> str:
        """Post a request, whose answer may reach `taker` before this returns; its id."""
        with self._lock:
            request = str(next(self._names))
            self._takers[request] = taker
            # A millisecond at least: who does not want to wait still takes what is free.
            left_s = NEVER_S if timeout_s is None else max(timeout_s, 0.001)
            self._post(RequestArrived(request, "library", model, 2, time.monotonic() + left_s))
            return request

    def _withdraw(self, request: str) -> None:
        """Whoever asked has left: out of the queue, or the slot back if it came in that very moment."""
        with self._lock:
            self._takers.pop(request, None)
            self._held.pop(request, None)
            self._post(RequestCancelled(request))

    def _tick(self) -> None:
        self._post(Ticked())

    def _post(self, event: Event) -> None:
        with self._lock:
            for command in self._ledger.decide(event, time.monotonic()):
                if isinstance(command, Grant | Reject):
                    self._answer(command)

    def _answer(self, answer: Grant | Reject) -> None:
        taker = self._takers.pop(answer.request, None)
        if taker is None:
            # Whoever asked leaves, and its deadline has come in that very moment: there is nobody to hear of it.
            return
        if isinstance(answer, Grant):
            self._held[answer.request] = answer
        try:
            taker(answer)
        except RuntimeError:
            # Its event loop was closed under it.
            self._withdraw(answer.request)


class ConcurrentDispatcher:
    """Waits for slots of a pool, for any number of tasks at once; first come, first served where models do not clash.

    Several dispatchers on one pool share its queue.
    """

    def __init__(self, pool: ServerPool) -> None:
        self._pool = pool

    async def submit(self, model: str, timeout: float | None = 60.0) -> str:
        """Wait for a slot of some server that offers `model`; its URL, to be given to `release_server`.

        Waits at most `timeout` seconds, None for ever. Raises `NoModelsAvailableError`, `ModelNotAvailableError` (also
        as soon as the last server that offers the model is gone) or `DispatcherTimeoutError`. Cancelled, it holds
        nothing.
        """
        self._insist_on(model)
        loop = asyncio.get_running_loop()
        thread = threading.get_ident()
        answer: asyncio.Future[Grant | Reject] = loop.create_future()

        def settle(value: Grant | Reject) -> None:
            if not answer.done():
                answer.set_result(value)

        def take(value: Grant | Reject) -> None:
            if threading.get_ident() == thread:
                settle(value)
            else:
                loop.call_soon_threadsafe(settle, value)

        request = self._pool._ask(model, timeout, take)
        alarm: asyncio.TimerHandle | None = None

        def ring() -> None:
            """Tell the ledger that the deadline has come; again if the timer was early."""
            nonlocal alarm
            self._pool._tick()
            if not answer.done():
                alarm = loop.call_later(0.001, ring)

        if timeout is not None and not answer.done():
            alarm = loop.call_later(timeout, ring)
        try:
            given = await answer
        except BaseException:
            # Cancelled while it waited, or after the slot had come and before this line was reached again.
            self._pool._withdraw(request)
            raise
        finally:
            if alarm is not None:
                alarm.cancel()
        if isinstance(given, Grant):
            return Slot.of(given)
        if given.error == "BackendTimeout":
            raise DispatcherTimeoutError(f"no slot for {model!r} came free within {timeout:g} s")
        self._insist_on(model)
        raise ModelNotAvailableError(given.message)

    def _insist_on(self, model: str) -> None:
        known = self._pool.get_all_available_models()
        if not known:
            reasons = {url: server.last_refresh_error for url, server in self._pool.servers.items()}
            raise NoModelsAvailableError(f"no server offers any model: {reasons}")
        if model not in known:
            raise ModelNotAvailableError(f"no server offers {model!r}; there are: {', '.join(sorted(known))}")
