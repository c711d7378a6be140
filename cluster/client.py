"""The ledger as its callers see it: one round trip for a lease, one-way messages for everything else.

A ledger that dies comes back empty within a second. A lease that was being waited for is asked for again under the
same id; the owner of this client announces itself again through `attach`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from ray.exceptions import RayActorError

from cluster import effects, errors
from cluster.ledger.events import Grant, Reject
from cluster.ledger.specs import PoolSpec

#: Pause between two attempts to reach a ledger that is being restarted, in seconds.
RETRY_S = 0.1


class LedgerClient:
    """Speaks to the ledger actor from one event loop. `connect` must come first; it blocks for a moment."""

    def __init__(self, spec: PoolSpec) -> None:
        self._spec = spec
        self._actor: Any = effects.get_or_create_ledger(spec)

    async def acquire(
        self, request: str, holder: str, model: str, priority: int, timeout_s: float, keep_alive_s: float | None = None
    ) -> Grant:
        """A lease on a slot of `model`. Waits at most `timeout_s`. Raises the `PoolError` that the ledger decides.

        Cancelling this call takes the request out of the queue.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            left = deadline - time.monotonic()
            try:
                answer = await self._actor.acquire.remote(request, holder, model, priority, left, keep_alive_s)
            except asyncio.CancelledError:
                self._actor.cancel.remote(request)
                raise
            except RayActorError:
                if left <= 0:
                    raise errors.BackendTimeout("the scheduler could not be reached", phase="queued") from None
                await asyncio.sleep(RETRY_S)
                continue
            if isinstance(answer, Reject):
                raise as_error(answer)
            return answer  # type: ignore[no-any-return]

    def release(self, lease: Grant) -> None:
        """Give a lease back; does not wait."""
        self._actor.release.remote(lease.request, lease.generation)

    async def waiting(self, request: str) -> tuple[str, int | str] | None:
        """Where a request waits: ("queued", position), ("loading", model) or None."""
        try:
            return await self._actor.waiting.remote(request)  # type: ignore[no-any-return]
        except RayActorError:
            return None

    async def status(self) -> dict[str, Any]:
        """The ledger's snapshot. Raises `BackendUnavailable` while there is no ledger."""
        try:
            return await self._actor.status.remote()  # type: ignore[no-any-return]
        except RayActorError:
            raise errors.BackendUnavailable("the scheduler is being restarted", retry_after=1) from None

    async def check(self) -> str | None:
        """The first broken invariant of the ledger in words, or None."""
        return await self._actor.check.remote()  # type: ignore[no-any-return]

    def tell(self, method: str, *args: Any) -> None:
        """A one-way message: `replica_progress`, `replica_ready` or `replica_failed`."""
        getattr(self._actor, method).remote(*args)

    async def stay_attached(self, method: str, state: Callable[[], Any]) -> None:
        """Announce `state()` through `method`, and again to every later life of the ledger. Runs until cancelled."""
        while True:
            try:
                attached: Awaitable[None] = getattr(self._actor, method).remote(state())
                await attached
            except RayActorError:
                await asyncio.sleep(RETRY_S)
                # A detached actor can be gone for good, when somebody killed it with no_restart.
                self._actor = await asyncio.to_thread(effects.get_or_create_ledger, self._spec)


def as_error(reject: Reject) -> errors.PoolError:
    """The exception that a refusal of the ledger stands for."""
    kind: type[errors.PoolError] = getattr(errors, reject.error, errors.PoolError)
    return kind(reject.message, **reject.extras)
