"""One replica of one model: it hosts an engine, tells the ledger of its life, and streams answers as bytes.

A failed load never raises into Serve, which would restart the process by itself: the replica reports the failure and
waits to be stopped. No request is served without a lease that names this very replica.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncGenerator

from ray import serve

from cluster import effects
from cluster.announcements import ReplicaState
from cluster.client import LedgerClient
from cluster.config import PoolConfig
from cluster.errors import BackendTimeout, BackendUnavailable, PoolError, ReplicaGone
from cluster.ledger.events import Grant
from cluster.orders import Address, EngineState
from deployments.coalesce import coalesce
from deployments.direct import DirectServer
from deployments.engines.protocol import Call, Engine, Progress
from deployments.engines.registry import build_engine
from deployments.sse import error_event
from deployments.weights import find_weights

logger = logging.getLogger("slotpool.replica")

#: The least time between two reports of a load's progress, in seconds. llama.cpp has one for every tensor: to send the
#: 272 of a small model took half as much CPU as to load it.
PROGRESS_PERIOD_S = 0.1
#: So long after a load, and after a pause in the requests, a replica starts spare processes, in seconds.
SPARES_AFTER_S = 5.0
PAUSE_S = 0.5
#: So many are kept on a machine: a visitor's swap takes one, and the swap back another. One takes 140 MiB.
SPARES = 2


def at_most_every(period_s: float, report: Progress) -> Progress:
    """`report`, without the calls that come sooner than `period_s` after one that went through."""
    next_at = 0.0

    def progress(fraction: float) -> None:
        nonlocal next_at
        now = time.monotonic()
        if now >= next_at:
            next_at = now + period_s
            report(fraction)

    return progress


class Replica:
    """The Serve deployment class behind every model."""

    async def __init__(self, config: PoolConfig, model: str) -> None:  # type: ignore[misc]
        self._model = model
        self._started_at = time.time()
        self._uid: str = serve.get_replica_context().replica_id.unique_id
        self._model_config = config.models[model]
        self._engine: Engine | None = None
        self._failed: str | None = None
        self._active = self._calls = 0
        self._idle = asyncio.Event()
        self._idle.set()
        loading = asyncio.create_task(self._load())
        # It begins in its thread beside what follows, which takes a fifth of a second.
        await asyncio.sleep(0)
        self._ledger = LedgerClient()
        self._actor_id, self._node = effects.this_actor()
        self._direct = DirectServer(effects.socket_path(self._uid), self.generate)
        with contextlib.suppress(OSError):
            await self._direct.start()
        self._life = [
            asyncio.create_task(self._ledger.stay_attached("attach_replica", self._state)),
            asyncio.create_task(self._report(loading)),
            loading,
            asyncio.create_task(self._help_successor()),
        ]

    def _state(self) -> ReplicaState:
        engine = None if self._engine is None else self._engine_state(self._engine)
        return ReplicaState(
            self._model, self._uid, self._actor_id, self._node, self._started_at, engine, self._failed, engine is None
        )

    def _engine_state(self, engine: Engine) -> EngineState:
        address = Address(self._node, str(effects.socket_path(self._uid)))
        return EngineState(address, os.getpid(), engine.info().memory_mib, None, self._model_config.revision)

    async def _load(self) -> Engine:
        """The engine, once it serves. Its progress is told through the event loop, so not before there is a ledger."""
        loop = asyncio.get_running_loop()

        def progress(fraction: float) -> None:
            loop.call_soon_threadsafe(lambda: self._ledger.tell("replica_progress", self._uid, fraction))

        path = await find_weights(self._model_config.model_path)
        engine = build_engine(self._model, self._model_config, path)
        await engine.load(at_most_every(PROGRESS_PERIOD_S, progress))
        return engine

    async def _report(self, loading: asyncio.Task[Engine]) -> None:
        """Tell the ledger what became of the load."""
        try:
            engine = await loading
        except Exception as error:
            known = isinstance(error, PoolError)
            if not known:
                logger.exception("loading %s failed", self._model)
            self._failed = str(error) if known else f"{type(error).__name__} while loading"
            self._ledger.tell("replica_failed", self._uid, self._failed)
            return
        self._engine = engine
        self._ledger.tell("replica_ready", self._uid, self._engine_state(engine))
        await self._keep_spares()

    async def _keep_spares(self) -> None:
        """See to it that the next swap here finds a process, which costs more than a second of CPU.

        Not as long as the model answers, on what may be the same cores, nor soon after its load, when the model that
        was here before may come straight back.
        """
        await asyncio.sleep(SPARES_AFTER_S)
        calls = -1
        while calls != self._calls:
            await self._idle.wait()
            calls = self._calls
            await asyncio.sleep(PAUSE_S)
        await self._start_spares(SPARES)

    async def _help_successor(self) -> None:
        """Have a process started for the next model while the last streams of this one run, if there is none yet."""
        while True:
            await self._ledger.drained(self._uid)
            if self._active:
                await self._start_spares(1)

    async def _start_spares(self, wanted: int) -> None:
        try:
            await asyncio.to_thread(effects.start_spare_processes, wanted)
        except Exception:
            # Without it the next replica only starts more slowly.
            logger.warning("no spare process was started", exc_info=True)

    async def generate(self, lease: Grant, call: Call, timeout_s: float) -> AsyncGenerator[bytes, None]:
        """Answer one leased call with the engine's bytes, coalesced. Raises a `PoolError` before the first item.

        A failure after the first item of a stream becomes a well-formed error event. `timeout_s` bounds the run.
        """
        engine = self._engine
        if lease.replica != self._uid or engine is None:
            raise ReplicaGone(f"{self._model} is not served by this replica")
        started = False
        self._active += 1
        self._calls += 1
        self._idle.clear()
        try:
            async with asyncio.timeout(timeout_s):
                reply = await engine.call(call)
            source = coalesce(reply.chunks, self._window_s, timeout_s)
            async with contextlib.aclosing(source) as chunks:
                async for chunk in chunks:
                    yield chunk
                    started = True
        except Exception as error:
            failure = self._as_pool_error(error)
            if not (started and call.stream):
                raise failure from None
            yield error_event(failure)
        finally:
            self._active -= 1
            if not self._active:
                self._idle.set()

    def _window_s(self) -> float:
        """How long to collect a stream's chunks: nothing while it is alone, up to 0.1 s when many share the replica.

        Every chunk that leaves costs the same whatever it carries, so the rate of chunks is what a busy pool saves: on
        two cores that also decode, 8 streams made 140 tokens/s with a window of 88 ms and 127 with one of 28.
        """
        return min(0.1, 0.025 * (self._active - 1))

    def _as_pool_error(self, error: Exception) -> PoolError:
        if isinstance(error, PoolError):
            return error
        if isinstance(error, TimeoutError):
            return BackendTimeout("the request ran longer than it may", phase="running")
        logger.exception("%s failed", self._model)
        return BackendUnavailable(f"the engine of {self._model} failed: {type(error).__name__}")

    async def __del__(self) -> None:
        await self._direct.stop()
        for task in self._life:
            task.cancel()
        if self._engine is not None:
            await self._engine.unload()
