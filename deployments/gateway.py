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
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import RayServeException

from cluster import effects, errors
from cluster.client import LedgerClient
from cluster.config import PoolConfig, ServerEntry
from cluster.config.version import Configuration
from cluster.ledger.events import Grant
from cluster.request import Request
from deployments.direct import call_directly
from deployments.engines.protocol import Call
from deployments.sse import DONE, comment, error_event

if TYPE_CHECKING:
    from deployments.engines.openai_upstream import Upstreams

logger = logging.getLogger("slotpool.gateway")

#: A waiting stream says where it waits this often, in seconds.
KEEP_ALIVE_S = 5.0
#: How often a request is tried on another replica, when its own vanished before the first byte.
RETRIES = 1


class Gateway:
    """The requests of one ingress process. `handles` maps every model id to its deployment's handle."""

    def __init__(self, configuration: Configuration, handles: Mapping[str, Any]) -> None:
        self.config: PoolConfig = configuration.pool
        self._holder = uuid.uuid4().hex
        self.ledger = LedgerClient(configuration, self._holder)
        self._handles = handles
        self._pinned: dict[str, Any] = {}
        self._upstreams: Upstreams | None = None
        self._actor_id, _ = effects.this_actor()
        self._life = [
            asyncio.create_task(self.ledger.attach_holder(self._actor_id)),
            asyncio.create_task(self.ledger.follow_configuration(self._configured)),
        ]

    def _configured(self, configuration: Configuration) -> None:
        self.config = configuration.pool

    async def stream(self, request: Request, body: dict[str, Any]) -> AsyncGenerator[bytes, None]:
        """The answer of the engine to a request and its body: SSE events for a streaming body, one JSON body otherwise.

        Waiting streams yield a comment every few seconds. Raises a `PoolError` for anything that goes wrong before
        the first byte; later failures of a stream are an error event. Closing the generator frees the slot.
        """
        arrived = time.monotonic()
        streams = bool(body.get("stream"))
        started = ended = False
        for attempt in range(RETRIES + 1):
            whole = bytearray()
            try:
                async with contextlib.aclosing(self._attempt(request, body, arrived)) as chunks:
                    async for chunk in chunks:
                        if not streams:
                            # Kept until it is complete: a part of a body cannot be mended by an error behind it.
                            whole += chunk
                            continue
                        started = started or not chunk.startswith(b":")
                        ended = chunk.endswith(DONE)
                        yield chunk
                if whole:
                    yield bytes(whole)
                return
            except errors.ReplicaGone as error:
                failure: errors.PoolError = error
                if not started and attempt < RETRIES:
                    continue
            except errors.PoolError as error:
                failure = error
            if ended:
                return  # The replica vanished behind its last word: the client has all of it.
            if started:
                yield error_event(failure)
                return
            raise failure

    async def _attempt(self, request: Request, body: dict[str, Any], arrived: float) -> AsyncGenerator[bytes, None]:
        # Each attempt has an id of its own: the lease of a vanished replica may still be in the ledger's books.
        attempt = request._replace(id=uuid.uuid4().hex, timeout_s=self._left(request, arrived))
        waiting = asyncio.ensure_future(self.ledger.acquire(attempt))
        lease = None
        try:
            while True:
                done, _ = await asyncio.wait([waiting], timeout=KEEP_ALIVE_S if body.get("stream") else None)
                if done:
                    break
                yield await self._where(attempt.id)
            lease = waiting.result()
            async with contextlib.aclosing(self._run(request, body, lease, arrived)) as chunks:
                async for chunk in chunks:
                    yield chunk
        finally:
            if lease is None and not waiting.cancel():
                # Granted in the very moment in which the client left.
                with contextlib.suppress(errors.PoolError, RayError, asyncio.CancelledError):
                    lease = waiting.result()
            if lease is not None:
                self.ledger.release(lease)

    async def _run(
        self, request: Request, body: dict[str, Any], lease: Grant, arrived: float
    ) -> AsyncGenerator[bytes, None]:
        # The model that answers may be another than was asked for: a variant, a fallback, a CPU offload.
        if lease.model != request.model:
            body = {**body, "model": lease.model}
        call = Call(
            path=request.path,
            body=body,
            request_id=request.trace,
            slots=max(1, len(lease.slots)),
            queue_wait_ms=lease.queue_wait_s * 1e3,
            load_wait_ms=lease.load_wait_s * 1e3,
            pool_elapsed_ms=(time.monotonic() - arrived) * 1e3,
        )
        server = self.config.server(lease.replica)
        if server is not None:
            async with contextlib.aclosing(
                self._on_server(server, request, call, self._left(request, arrived))
            ) as chunks:
                async for chunk in chunks:
                    yield chunk
            return
        socket = effects.socket_path(lease.replica)
        way = call_directly if socket.exists() else self._through_serve
        async with contextlib.aclosing(way(socket, lease, call, self._left(request, arrived))) as chunks:
            async for chunk in chunks:
                yield chunk

    async def _on_server(
        self, server: ServerEntry, request: Request, call: Call, timeout_s: float
    ) -> AsyncGenerator[bytes, None]:
        """The way to an external server. One that is lost is looked at before it gets anything else."""
        if self._upstreams is None:
            # Imports an HTTP client, which a pool without servers does without.
            from deployments.engines.openai_upstream import Upstreams

            self._upstreams = Upstreams()
        # An idle timeout of 0 means never; -1 is that in the servers' words.
        hold_s = (self.config.default_idle_timeout or -1.0) if request.keep_alive_s is None else request.keep_alive_s
        try:
            async with contextlib.aclosing(self._upstreams.generate(server, call, hold_s, timeout_s)) as chunks:
                async for chunk in chunks:
                    yield chunk
        except errors.ReplicaGone:
            self.ledger.tell("server_lost", server.url)
            raise

    async def _through_serve(self, _: Path, lease: Grant, call: Call, timeout_s: float) -> AsyncGenerator[bytes, None]:
        """The way to a replica on another machine: its Serve handle, pinned."""
        answer = (self._pinned.get(lease.replica) or self._pin(lease)).generate.remote(lease, call, timeout_s)
        finished = False
        try:
            async for chunk in answer:
                yield chunk
            finished = True
        except (RayError, RayServeException, errors.PoolError) as error:
            finished = True
            raise self._translate(error, lease) from None
        finally:
            if not finished:
                answer.cancel()

    def _pin(self, lease: Grant) -> Any:
        """A handle that reaches one replica only. Kept per replica, since making one costs more than a call."""
        if len(self._pinned) > 1000:
            self._pinned.clear()
        handle = self._handles[lease.model].options(session_id=lease.replica, stream=True)
        self._pinned[lease.replica] = handle
        return handle

    def _translate(self, error: BaseException, lease: Grant) -> errors.PoolError:
        cause = getattr(error, "cause", None) or error
        if isinstance(cause, errors.PoolError):
            return cause
        if isinstance(cause, RayActorError | RayServeException) or isinstance(error, RayActorError | RayServeException):
            return errors.ReplicaGone(f"the replica of {lease.model} went away", retry_after=1)
        logger.error("calling a replica of %s failed: %r", lease.model, error)
        return errors.PoolError(f"the replica of {lease.model} failed")

    def _left(self, request: Request, arrived: float) -> float:
        return max(0.0, arrived + request.timeout_s - time.monotonic())

    async def _where(self, request: str) -> bytes:
        where = await self.ledger.waiting(request)
        if where is not None and where[0] == "loading":
            return comment(f"loading model={where[1]}")
        return comment(f"queued position={where[1]}" if where else "queued")
