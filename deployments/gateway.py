"""One request's walk: ask the ledger for a lease, stream from the leased replica, give the lease back in `finally`.

Every family of routes and the Python handle come through here, so there is one place where a lease can be lost. It
knows nothing of HTTP. Before the first byte a request whose replica vanished is tried once more elsewhere; after it,
the client gets an error event.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ray.exceptions import RayError

from cluster import effects, errors
from cluster.client import LedgerClient
from cluster.config import PoolConfig, ServerEntry
from cluster.config.version import Configuration
from cluster.frames import raise_file_limit
from cluster.ledger.events import Grant
from cluster.metrics import Outcome, family
from cluster.orders import Address
from cluster.request import Request
from deployments.engines.protocol import Call, Reply
from deployments.leased_call import LeasedCall, ServeWay, Way
from deployments.limits import Limits
from deployments.link import Leased, Links
from deployments.request_log import RequestLog
from deployments.run_info import RunInfo
from deployments.sse import DONE, comment, error_event, is_comment

if TYPE_CHECKING:
    from deployments.engines.openai_upstream import Upstreams

logger = logging.getLogger("slotpool.gateway")

#: A waiting stream says where it waits this often, in seconds.
KEEP_ALIVE_S = 5.0
#: How long a request waits that waits for as long as its client stays, in seconds: every wait has an end.
PATIENCE_S = 7 * 86_400.0
#: How often a request is tried on another replica, when its own vanished before the first byte.
RETRIES = 1
#: Pause before that, in seconds: a connection ends a moment before the ledger has heard of the engine's death, and
#: would lease the dead one again.
RETRY_PAUSE_S = 0.3
#: The status that stands for a client that did not wait for its answer, in the pool's own figures.
CLIENT_LEFT = 499


class Gateway:
    """The requests of one process. `handles` maps every model id to its deployment's handle.

    An ingress makes the ledger where there is none; who only uses the pool gives the client that found it.
    """

    def __init__(
        self, configuration: Configuration, handles: Mapping[str, Any], ledger: LedgerClient | None = None
    ) -> None:
        raise_file_limit()
        self.config: PoolConfig = configuration.pool
        self.limits = Limits()
        self.limits.follow(self.config)
        self.request_log = RequestLog()
        self.request_log.follow(self.config)
        self.ledger = ledger or LedgerClient(configuration, uuid.uuid4().hex)
        self.on_configuration: list[Callable[[Configuration], None]] = []
        self._handles = handles
        self._pinned: dict[str, Any] = {}
        self._upstreams: Upstreams | None = None
        self._actor_id, node = effects.this_actor()
        self._links = Links(node)
        self._life = [
            asyncio.create_task(self.ledger.attach_holder(self._actor_id)),
            asyncio.create_task(self.ledger.stay_linked(node)),
            asyncio.create_task(self.ledger.follow_configuration(self._configured)),
        ]

    def _configured(self, configuration: Configuration) -> None:
        self.config = configuration.pool
        self.limits.follow(self.config)
        self.request_log.follow(self.config)
        for each in self.on_configuration:
            each(configuration)

    def stream(
        self, request: Request, body: dict[str, Any], info: RunInfo | None = None
    ) -> AsyncGenerator[bytes, None]:
        """The answer of the engine to a request and its body: SSE events for a streaming body, one body otherwise.

        Waiting streams yield a comment every few seconds. Raises a `PoolError` for anything that goes wrong before the
        first byte, comments included; later failures of a stream are an error event. Closing the generator frees the
        slot. `info` learns what becomes of the request.
        """
        info = info or RunInfo()
        call = Call(request.path, body, request.trace, priority=request.priority)
        return self._around(request, call, info, self._stream(request, call, info))

    def _around(
        self, request: Request, call: Call, info: RunInfo, chunks: AsyncGenerator[bytes, None]
    ) -> AsyncGenerator[bytes, None]:
        """The same chunks within the limits that hold for them, and with a line in the log of requests."""
        if self.limits.apply_to(request):
            chunks = self.limits.around(request, info, chunks)
        if self.request_log.is_on:
            chunks = self.request_log.around(request, info, chunks, is_stream=call.stream)
        return chunks

    async def _stream(self, request: Request, call: Call, info: RunInfo) -> AsyncGenerator[bytes, None]:
        streams = call.stream
        begun = started = ended = False
        retries = self._retries(request)
        for attempt in range(retries + 1):
            whole = bytearray()
            try:
                source = self._attempt(request, call, info, is_last=attempt == retries)
                async with contextlib.aclosing(source) as chunks:
                    async for chunk in chunks:
                        if not streams:
                            # Kept until it is complete: a part of a body cannot be mended by an error behind it.
                            whole += chunk
                            continue
                        begun = True
                        started = started or not is_comment(chunk)
                        ended = chunk.endswith(DONE)
                        yield chunk
                if whole:
                    yield bytes(whole)
                return
            except errors.ReplicaGone as error:
                failure: errors.PoolError = error
                if not started and attempt < retries:
                    await asyncio.sleep(RETRY_PAUSE_S)
                    continue
            except errors.PoolError as error:
                failure = error
            if ended:
                return  # The replica vanished behind its last word: the client has all of it.
            if not begun:
                raise failure
            info.failure = failure
            yield error_event(failure)
            return

    async def pass_through(self, request: Request, call: Call) -> tuple[bytes, Reply]:
        """The first part of the engine's own answer, whatever its status, and the rest, whose chunks must be closed.

        Raises a `PoolError` for anything that goes wrong before the first byte; the chunks raise what does later.
        """
        info = RunInfo()
        chunks = self._around(request, call, info, self._raw(request, call, info))
        try:
            first = await anext(chunks, b"")
        except BaseException:
            await chunks.aclose()
            raise
        return first, Reply(info.status, info.headers, chunks)

    async def _raw(self, request: Request, call: Call, info: RunInfo) -> AsyncGenerator[bytes, None]:
        retries = self._retries(request)
        for attempt in range(retries + 1):
            has_begun = False
            try:
                async with contextlib.aclosing(
                    self._attempt(request, call, info, is_last=attempt == retries)
                ) as chunks:
                    async for chunk in chunks:
                        has_begun = True
                        yield chunk
                return
            except errors.ReplicaGone:
                if has_begun or attempt == retries:
                    raise
                await asyncio.sleep(RETRY_PAUSE_S)

    def _retries(self, request: Request) -> int:
        """How often a request is tried again. A remote API, which may have its price for each, gets it once."""
        model = self.config.models.get(request.model)
        return 0 if model is not None and model.is_remote else RETRIES

    async def touch(self, request: Request) -> None:
        """Wait for a lease as the request would, and give it back unused: its model is loaded then, and stays as asked.

        Raises the `PoolError` that the ledger decides.
        """
        wait_s = PATIENCE_S if request.is_patient else request.timeout_s
        self.ledger.release(await self.ledger.acquire(request._replace(id=uuid.uuid4().hex, timeout_s=wait_s)))

    async def on_lease(self, request: Request, call: Call, lease: Grant, left_s: float) -> AsyncGenerator[bytes, None]:
        """The engine's answer to a call on a lease that the caller keeps. Raises the `PoolError` that it ends with.

        Nothing is tried again, since the lease is for one replica.
        """
        run = LeasedCall(left_s, lambda status: None, lambda: self._suspect(lease))
        try:
            async with contextlib.aclosing(self._run(request, call, lease, RunInfo(), run, left_s)) as chunks:
                async for chunk in chunks:
                    yield chunk
        finally:
            run.end(None)

    async def _attempt(
        self, request: Request, call: Call, info: RunInfo, *, is_last: bool
    ) -> AsyncGenerator[bytes, None]:
        """One lease and the call that runs on it. A lease that is lost before the first byte counts as no request."""
        # Each attempt has an id of its own: the lease of a vanished replica may still be in the ledger's books.
        wait_s = PATIENCE_S if request.is_patient else _left(request, info.arrived)
        attempt = request._replace(id=uuid.uuid4().hex, timeout_s=wait_s)
        waiting = asyncio.ensure_future(self.ledger.acquire(attempt))
        lease = None
        try:
            while True:
                done, _ = await asyncio.wait([waiting], timeout=KEEP_ALIVE_S if call.stream else None)
                if done:
                    break
                yield await self._where(attempt.id)
            lease = waiting.result()
        finally:
            if lease is None and not waiting.cancel():
                # Granted in the very moment in which the client left.
                with contextlib.suppress(errors.PoolError, RayError, asyncio.CancelledError):
                    self.ledger.release(waiting.result())
        # A patient one has the time that it may run, however long it has waited.
        left_s = request.timeout_s if request.is_patient else _left(request, info.arrived)
        run = self._leased_call(request, call, lease, info.arrived, left_s)
        status: int | None = CLIENT_LEFT
        try:
            async with contextlib.aclosing(self._run(request, call, lease, info, run, left_s)) as chunks:
                async for chunk in chunks:
                    info.status, info.headers = run.status, run.headers
                    if chunk.endswith(DONE):
                        # Who leaves behind the last word has all of it.
                        status = run.status
                    yield chunk
            status = info.status = run.status
            info.headers = run.headers
        except errors.PoolError as error:
            is_lost = isinstance(error, errors.ReplicaGone) and run.first_at is None and not is_last
            status = None if is_lost else error.status
            raise
        finally:
            info.report = run.report
            run.end(status)

    def _leased_call(self, request: Request, call: Call, lease: Grant, arrived: float, left_s: float) -> LeasedCall:
        def release(status: int | None) -> None:
            ended = None if status is None else outcome(request, lease, run, status, arrived, is_stream=call.stream)
            self.ledger.release(lease, ended)

        run = LeasedCall(left_s, release, lambda: self._suspect(lease))
        return run

    def _suspect(self, lease: Grant) -> None:
        """The engine of a lease has let its deadline pass without a word."""
        if self.config.server(lease.replica) is None:
            self.ledger.tell("replica_suspected", lease.replica)

    async def _run(
        self, request: Request, call: Call, lease: Grant, info: RunInfo, run: LeasedCall, left_s: float
    ) -> AsyncGenerator[bytes, None]:
        body, info.devices = call.body, lease.devices
        # The model that answers may be another than was asked for: a variant, a fallback, a CPU offload.
        if lease.model != request.model and isinstance(body, dict):
            body = {**body, "model": lease.model}
        call = info.call = replace(
            call,
            body=body,
            slots=max(1, len(lease.slots)),
            queue_wait_ms=lease.queue_wait_s * 1e3,
            load_wait_ms=lease.load_wait_s * 1e3,
            pool_elapsed_ms=(time.monotonic() - info.arrived) * 1e3,
        )
        server = self.config.server(lease.replica)
        if server is not None:
            chunks = self._on_server(server, request, call, left_s, run)
        else:
            leased = Leased(lease.replica, lease.request, lease.generation, left_s, call)
            gone = errors.ReplicaGone(f"the replica of {lease.model} went away", retry_after=1)
            chunks = run.run(lambda: self._open(lease, leased), gone)
        async with contextlib.aclosing(chunks):
            async for chunk in chunks:
                run.first_at = run.first_at or time.monotonic()
                yield chunk

    async def _open(self, lease: Grant, leased: Leased) -> Way:
        """The way to an engine: the socket on this machine, the port on another, or else Serve's handle, pinned."""
        address: Address | None = lease.address
        if address is not None and self._links.reaches(address):
            return await self._links.call(address, leased)
        handle = self._pinned.get(lease.replica) or self._pin(lease)
        return ServeWay(handle.relay.remote(*leased.encode()), lease)

    async def _on_server(
        self, server: ServerEntry, request: Request, call: Call, timeout_s: float, run: LeasedCall
    ) -> AsyncGenerator[bytes, None]:
        """The way to an external server. One that is lost is looked at before it gets anything else."""
        # Imports an HTTP client, which a pool without servers does without.
        from deployments.engines.openai_upstream import Target, Upstreams

        if self._upstreams is None:
            self._upstreams = Upstreams()
        # An idle timeout of 0 means never; -1 is that in the servers' words.
        hold_s = (self.config.default_idle_timeout or -1.0) if request.keep_alive_s is None else request.keep_alive_s
        try:
            reply = await self._upstreams.call(Target.of(server, hold_s), call, timeout_s)
            run.status, run.headers, run.report = reply.status, reply.headers, reply.report
            async with contextlib.aclosing(reply.chunks) as chunks:
                async for chunk in chunks:
                    yield chunk
        except errors.ReplicaGone:
            self.ledger.tell("server_lost", server.url)
            raise

    def _pin(self, lease: Grant) -> Any:
        """A handle that reaches one replica only. Kept per replica, since making one costs more than a call."""
        if len(self._pinned) > 1000:
            self._pinned.clear()
        handle = self._handles[lease.model].options(session_id=lease.replica, stream=True)
        self._pinned[lease.replica] = handle
        return handle

    async def _where(self, request: str) -> bytes:
        place = await self.ledger.waiting(request)
        if place is None:
            return comment("queued")
        if place.state == "loading":
            percent = "" if place.progress is None else f" {place.progress:.0%}"
            return comment(f"loading model={place.where}{percent}")
        return comment(f"queued position={place.where}")


def _left(request: Request, arrived: float) -> float:
    return max(0.0, arrived + request.timeout_s - time.monotonic())


def outcome(
    request: Request, lease: Grant, call: LeasedCall, status: int, arrived: float, *, is_stream: bool
) -> Outcome:
    """How a request ended, for the pool's figures."""
    report = call.report
    ttft_s = None
    if is_stream:
        ttft_s = None if call.first_at is None else call.first_at - arrived
    elif report.ttft_ms is not None:
        ttft_s = lease.queue_wait_s + lease.load_wait_s + report.ttft_ms / 1e3
    return Outcome(
        lease.model,
        family(request.path),
        request.principal,
        request.priority,
        status,
        lease.queue_wait_s,
        lease.load_wait_s,
        ttft_s,
        time.monotonic() - arrived,
        report.prompt_tokens,
        report.cached_tokens,
        report.output_tokens,
        request.trace,
        report.restored_tokens,
    )
