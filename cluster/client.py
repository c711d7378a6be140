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
from cluster.ledger.events import Grant, LoadRefused, Reject
from cluster.ledger.snapshot import Snapshot
from cluster.ledger.specs import PoolSpec
from cluster.metrics import Outcome
from cluster.request import Request

#: Pause between two attempts to reach a ledger that is being restarted, in seconds.
RETRY_S = 0.1
#: For how long an operator's call looks for a ledger, in seconds.
OPERATOR_PATIENCE_S = 30.0


class LedgerClient:
    """Speaks to the ledger actor from one event loop. Making one blocks for a moment."""

    def __init__(self, spec: PoolSpec, holder: str = "") -> None:
        self._spec = spec
        self._holder = holder
        self._actor: Any = _ledger(spec)
        self._asked: list[tuple[Request, asyncio.Future[Grant | Reject | None]]] = []
        self._unasked = asyncio.Event()
        self._settled: list[tuple[str, int | None, Outcome | None]] = []
        self._unsent = asyncio.Event()
        self._senders = [asyncio.create_task(self._send_asked()), asyncio.create_task(self._send_settled())]

    async def acquire(self, request: Request) -> Grant:
        """A lease for a request. Waits at most its `timeout_s`. Raises the `PoolError` that the ledger decides.

        Cancelling this call takes the request out of the queue.
        """
        deadline = time.monotonic() + request.timeout_s
        while True:
            left = deadline - time.monotonic()
            asked = request._replace(timeout_s=left)
            try:
                answer = await self._ask(asked)
                if answer is None:
                    answer = await self._actor.acquire.remote(self._holder, asked)
            except RayActorError:
                if left <= 0:
                    raise errors.BackendTimeout("the scheduler could not be reached", phase="queued") from None
                await asyncio.sleep(RETRY_S)
                continue
            except BaseException:
                # Besides CancelledError also Ray's TaskCancelledError: of a cancelled request and its remote calls,
                # either can be the first to hear of it.
                self._settle(request.id, None)
                raise
            if isinstance(answer, Reject):
                raise as_error(answer)
            return answer

    async def _ask(self, asked: Request) -> Grant | Reject | None:
        answer: asyncio.Future[Grant | Reject | None] = asyncio.get_running_loop().create_future()
        self._asked.append((asked, answer))
        self._unasked.set()
        return await answer

    async def _send_asked(self) -> None:
        """Send the requests that arrived while the ones before them were on their way: a burst costs few round trips.

        One alone goes at once. A request that is cancelled before it is sent never is; afterwards, what was settled
        follows it, for calls to an actor keep their order.
        """
        while True:
            await self._unasked.wait()
            self._unasked.clear()
            batch = [each for each in self._asked if not each[1].done()]
            self._asked.clear()
            if not batch:
                continue
            try:
                answers = await self._actor.acquire_now.remote(self._holder, [asked for asked, _ in batch])
            except RayActorError as error:
                for _, waiting in batch:
                    if not waiting.done():
                        waiting.set_exception(error)
                continue
            for (_, waiting), answer in zip(batch, answers, strict=True):
                if not waiting.done():
                    waiting.set_result(answer)

    def release(self, lease: Grant, outcome: Outcome | None = None) -> None:
        """Give a lease back, and say how its request ended; does not wait."""
        self._settle(lease.request, lease.generation, outcome)

    def _settle(self, request: str, generation: int | None, outcome: Outcome | None = None) -> None:
        self._settled.append((request, generation, outcome))
        self._unsent.set()

    async def _send_settled(self) -> None:
        """Send what was given back, in as few messages as there are turns of the event loop.

        A task of its own, because a request that is cancelled takes along the remote calls that it has made: Ray
        cancels the children of a cancelled task, and a cancelled release is a slot lost for ever.
        """
        while True:
            await self._unsent.wait()
            self._unsent.clear()
            settled, self._settled = self._settled, []
            self._actor.settle.remote(settled)

    async def waiting(self, request: str) -> tuple[str, int | str] | None:
        """Where a request waits: ("queued", position), ("loading", model) or None."""
        try:
            return await self._actor.waiting.remote(request)  # type: ignore[no-any-return]
        except RayActorError:
            return None

    async def status(self) -> Snapshot:
        """The ledger's snapshot. Raises `BackendUnavailable` while there is no ledger."""
        try:
            return await self._actor.status.remote()  # type: ignore[no-any-return]
        except RayActorError:
            raise errors.BackendUnavailable("the scheduler is being restarted", retry_after=1) from None

    async def load(self, model: str, replicas: int) -> int:
        """Load so many replicas, all or none, and wait until they serve; the number that does.

        Raises the `PoolError` that stands for a refusal or a failed load, and `BackendUnavailable` without a ledger.
        """
        return await self._operate("load", model, replicas)

    async def unload(self, model: str) -> None:
        """Unload a model and wait until it is gone. Raises the `PoolError` that stands for a refusal."""
        await self._operate("unload", model)

    async def _operate(self, method: str, *args: Any) -> int:
        """Both orders may be given twice, so a ledger that died meanwhile is asked again once it is back."""
        lost = 0
        while True:
            asked_at = time.monotonic()
            try:
                outcome = await getattr(self._actor, method).remote(*args)
            except RayActorError:
                # A call that was parked for a while had found a ledger: the search begins anew.
                lost = lost + 1 if time.monotonic() - asked_at < 1.0 else 1
                if lost * RETRY_S > OPERATOR_PATIENCE_S:
                    raise errors.BackendUnavailable("the scheduler could not be reached", retry_after=1) from None
                await asyncio.sleep(RETRY_S)
                continue
            if isinstance(outcome, LoadRefused):
                raise as_error(outcome)
            return int(outcome.replicas)

    async def check(self) -> str | None:
        """The first broken invariant of the ledger in words, or None."""
        return await self._actor.check.remote()  # type: ignore[no-any-return]

    def tell(self, method: str, *args: Any) -> None:
        """A one-way message: `replica_progress`, `replica_ready`, `replica_failed` or `server_lost`."""
        getattr(self._actor, method).remote(*args)

    async def drained(self, replica: str) -> None:
        """Wait until the ledger drains a replica, which is when its successor is chosen."""
        while True:
            try:
                return await self._actor.drained.remote(replica)  # type: ignore[no-any-return]
            except RayActorError:
                await asyncio.sleep(RETRY_S)

    async def stay_attached(self, method: str, state: Callable[[], Any]) -> None:
        """Announce `state()` through `method`, and again to every later life of the ledger. Runs until cancelled."""
        while True:
            try:
                attached: Awaitable[None] = getattr(self._actor, method).remote(state())
                await attached
            except RayActorError:
                await asyncio.sleep(RETRY_S)
                # A detached actor can be gone for good, when somebody killed it with no_restart.
                self._actor = await asyncio.to_thread(_ledger, self._spec)


def _ledger(spec: PoolSpec) -> Any:
    # Imported here: most processes find the ledger running, and need none of its code.
    from cluster.actor import LedgerActor

    return effects.get_or_create_ledger(LedgerActor, spec)


def as_error(reject: Reject | LoadRefused) -> errors.PoolError:
    """The exception that a refusal of the ledger stands for."""
    kind: type[errors.PoolError] = getattr(errors, reject.error, errors.PoolError)
    extras = reject.extras
    if kind is errors.ModelNotFound:
        # The ledger knows nothing of HTTP's fields and routes.
        extras = {"param": "model", "install_endpoint": "/v1/models/install", **extras}
    return kind(reject.message, **extras)
