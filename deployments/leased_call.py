"""One leased call from an ingress to an engine, on whichever way leads there, and never longer than its deadline.

The deadline does not depend on anybody reading: a client that stops reading, or an engine that hangs, loses its lease
when the time is over. It must not know what a request was before it had a lease.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, Protocol

from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import RayServeException

from cluster import errors
from cluster.ledger.events import Grant
from deployments.engines.protocol import Report
from deployments.link import Answer

logger = logging.getLogger("slotpool.gateway")

#: What an engine gets beyond the deadline to say itself that the time is over, in seconds.
SLACK_S = 0.5


class Way(Protocol):
    """Frames of one answer: a connection of the link, or Serve's handle."""

    def __aiter__(self) -> Way: ...

    async def __anext__(self) -> tuple[bytes, bytes]: ...

    @property
    def is_waiting(self) -> bool:
        """Whether somebody waits for the next frame."""

    def fail(self, error: Exception) -> None:
        """Give up: whoever waits gets `error` at once."""

    def close(self) -> None:
        """End the call if it runs."""


class LeasedCall:
    """The time of one lease. `release` is called once: at the end, or at the deadline if that is earlier.

    It gets the HTTP status that the call ended with, or None where it was lost and will be made again. `suspect` is
    called when the engine has let the deadline pass without a word.
    """

    def __init__(
        self, left_s: float, release: Callable[[int | None], None], suspect: Callable[[], None] = lambda: None
    ) -> None:
        self._release, self._suspect = release, suspect
        self._way: Way | None = None
        self._is_released = self._is_running = self.is_expired = False
        loop = asyncio.get_running_loop()
        self._ends_at = loop.time() + left_s + SLACK_S
        self._alarm = loop.call_at(self._ends_at, self._expire)
        self.first_at: float | None = None
        self.status = 200
        self.headers: dict[str, str] = {}
        self.report = Report()

    async def run(self, open_way: Callable[[], Awaitable[Way]], gone: errors.PoolError) -> AsyncGenerator[bytes, None]:
        """The answer's bytes. Raises the engine's error, `gone` if it vanished, `BackendTimeout` past the deadline."""
        self._is_running = True
        try:
            # A moment later than the alarm, which says whose fault it is.
            async with asyncio.timeout_at(self._ends_at + 0.01):
                way = self._way = await open_way()
            answer = Answer(way)
            await answer.begin()
            self.status, self.headers = answer.status, answer.headers
            try:
                async with contextlib.aclosing(answer.chunks()) as chunks:
                    async for chunk in chunks:
                        self.first_at = self.first_at or time.monotonic()
                        yield chunk
            finally:
                self.report = answer.report or self.report
        except (OSError, StopAsyncIteration):
            raise (too_long() if self.is_expired else gone) from None
        finally:
            if self._way is not None:
                self._way.close()

    def end(self, status: int | None) -> None:
        """Give the lease back, if that has not been done."""
        self._alarm.cancel()
        if not self._is_released:
            self._is_released = True
            self._release(status)

    def _expire(self) -> None:
        self.is_expired = True
        way = self._way
        hangs = self._is_running and (way is None or way.is_waiting)
        self.end(too_long().status)
        if way is not None:
            way.fail(too_long())
        if hangs:
            self._suspect()


def too_long() -> errors.BackendTimeout:
    """The contract's word for a run that its deadline has ended."""
    return errors.BackendTimeout("the request ran longer than it may", phase="running")


class ServeWay:
    """The way through Serve's handle, for a replica that no socket reaches. Each item is a frame: kind and payload."""

    def __init__(self, items: Any, lease: Grant) -> None:
        self._items, self._lease = items, lease
        self._pending: asyncio.Future[bytes] | None = None
        self._failure: Exception | None = None
        self._is_over = False

    def __aiter__(self) -> ServeWay:
        return self

    async def __anext__(self) -> tuple[bytes, bytes]:
        if self._failure is not None:
            raise self._failure
        self._pending = asyncio.ensure_future(anext(self._items))
        try:
            item = await self._pending
        except StopAsyncIteration:
            self._is_over = True
            raise
        except asyncio.CancelledError:
            if self._failure is not None:
                raise self._failure from None
            raise
        except (RayError, RayServeException, errors.PoolError) as error:
            self._is_over = True
            raise self._translate(error) from None
        finally:
            self._pending = None
        return item[:1], item[1:]

    @property
    def is_waiting(self) -> bool:
        return self._pending is not None

    def fail(self, error: Exception) -> None:
        self._failure = error
        if self._pending is not None:
            self._pending.cancel()

    def close(self) -> None:
        if not self._is_over:
            self._items.cancel()

    def _translate(self, error: BaseException) -> errors.PoolError:
        cause = getattr(error, "cause", None) or error
        if isinstance(cause, errors.PoolError):
            return cause
        if isinstance(cause, RayActorError | RayServeException) or isinstance(error, RayActorError | RayServeException):
            return errors.ReplicaGone(f"the replica of {self._lease.model} went away", retry_after=1)
        logger.error("calling a replica of %s failed: %r", self._lease.model, error)
        return errors.PoolError(f"the replica of {self._lease.model} failed")
