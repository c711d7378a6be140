"""One replica of one model: it hosts an engine, tells the ledger of its life, and streams answers as bytes.

A failed load never raises into Serve, which would restart the process by itself: the replica reports the failure and
waits to be stopped. No request is served without a lease that names this very replica.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator

from ray import serve

from cluster import effects
from cluster.announcements import ReplicaState
from cluster.client import LedgerClient
from cluster.config import PoolConfig
from cluster.errors import BackendTimeout, BackendUnavailable, PoolError, ReplicaGone
from cluster.ledger.events import Grant
from deployments.coalesce import coalesce
from deployments.direct import DirectServer
from deployments.engines.build import build_engine
from deployments.engines.protocol import Call, Engine
from deployments.sse import error_event
from deployments.weights import resolve_weights

logger = logging.getLogger("slotpool.replica")

#: How long after a load a replica starts spare processes, in seconds.
SPARES_AFTER_S = 5.0


class Replica:
    """The Serve deployment class behind every model."""

    async def __init__(self, config: PoolConfig, model: str) -> None:  # type: ignore[misc]
        self._model = model
        self._uid: str = serve.get_replica_context().replica_id.unique_id
        self._model_config = config.models[model]
        self._engine: Engine | None = None
        self._ledger = LedgerClient(config.spec())
        self._actor_id, self._node = effects.this_actor()
        self._failed: str | None = None
        self._active = 0
        self._direct = DirectServer(effects.socket_path(self._uid), self.generate)
        with contextlib.suppress(OSError):
            await self._direct.start()
        self._life = [
            asyncio.create_task(self._ledger.stay_attached("attach_replica", self._state)),
            asyncio.create_task(self._load()),
        ]

    def _state(self) -> ReplicaState:
        memory_mib = self._engine.info().memory_mib if self._engine else None
        ready = self._engine is not None
        return ReplicaState(self._model, self._uid, self._actor_id, self._node, ready, self._failed, memory_mib)

    async def _load(self) -> None:
        loop = asyncio.get_running_loop()

        def progress(fraction: float) -> None:
            loop.call_soon_threadsafe(self._ledger.tell, "replica_progress", self._uid, fraction)

        try:
            path = await asyncio.to_thread(resolve_weights, self._model_config.model_path)
            engine = build_engine(self._model, self._model_config, path)
            await engine.load(progress)
        except Exception as error:
            known = isinstance(error, PoolError)
            if not known:
                logger.exception("loading %s failed", self._model)
            self._failed = str(error) if known else f"{type(error).__name__} while loading"
            self._ledger.tell("replica_failed", self._uid, self._failed)
            return
        self._engine = engine
        self._ledger.tell("replica_ready", self._uid, engine.info().memory_mib)
        await self._start_spares()

    async def _start_spares(self) -> None:
        """See to it that the next swap here finds a process.

        Later than the load, since its imports would take the CPU from the answers that were waited for, and from the
        model that was here before, if it comes straight back.
        """
        await asyncio.sleep(SPARES_AFTER_S)
        try:
            await asyncio.to_thread(effects.start_spare_processes)
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
        try:
            source = coalesce(engine.generate(call), self._window_s, timeout_s)
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

    def _window_s(self) -> float:
        """How long to collect a stream's chunks: nothing while it is alone, up to 50 ms when many share the replica.

        Every chunk that leaves costs the same whatever it carries, so the rate of chunks is what a busy pool saves.
        """
        return min(0.05, 0.004 * (self._active - 1))

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
