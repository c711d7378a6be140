"""Leases as their takers see them: one round trip for a lease, a one-way message to give it back.

A ledger that dies comes back empty within a second. A lease that was being waited for is asked for again under the
same id, and the owner of this client is announced again. A ledger that hangs costs a caller no more than the time it
has given: every call is bounded here.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

from ray.exceptions import RayActorError

from cluster import effects, errors
from cluster.announcements import HolderState
from cluster.config.version import Configuration
from cluster.lease_link import LeaseLink
from cluster.ledger.events import Grant, Reject
from cluster.ledger_calls import ANSWER_S, FAULT_PAUSE_S, RETRY_S, LedgerCalls, as_error, supervised, within
from cluster.metrics import Outcome
from cluster.parked import unpacked
from cluster.request import Request
from cluster.waiting import Place

logger = logging.getLogger("slotpool.client")

#: What a parked call is given beyond its own time, in seconds: the ledger's own word at the deadline says more.
SLACK_S = 0.5
#: How often a holder says what it holds, in seconds: a release that was lost costs its slot no longer.
ALIVE_PERIOD_S = 10.0

Answer = Grant | Reject | None


class _Arrival(NamedTuple):
    """A request on its way, and until when somebody waits for its answer."""

    request: Request
    deadline: float
    answer: asyncio.Future[Answer]


class LedgerClient(LedgerCalls):
    """Speaks to the ledger actor from one event loop. Making one blocks for a moment.

    With a `configuration` it makes the ledger where there is none, and with a `holder` id it takes leases. A holder
    that makes none is a guest: it has the configuration from the ledger (`newest_configuration`).
    """

    def __init__(self, configuration: Configuration | None = None, holder: str = "") -> None:
        super().__init__(configuration)
        self._holder = holder
        self._waiting: dict[str, None] = {}
        self._held: dict[str, Grant] = {}
        self._sent = 0
        self._link = LeaseLink()
        self._pending_arrivals: list[_Arrival] = []
        self._pending_releases: list[tuple[str, int | None, Outcome | None]] = []
        self._has_arrivals = asyncio.Event()
        self._has_releases = asyncio.Event()
        # Tasks of their own, because a request that is cancelled takes along the remote calls that it has made: Ray
        # cancels the children of a cancelled task, and a cancelled release is a slot lost.
        self._senders = [
            asyncio.create_task(supervised(self._send_arrivals)),
            asyncio.create_task(supervised(self._send_releases)),
        ]

    # --- leases -------------------------------------------------------------------------------------------------

    async def acquire(self, request: Request) -> Grant:
        """A lease for a request. Waits at most its `timeout_s`. Raises the `PoolError` that the ledger decides.

        Cancelling this call takes the request out of the queue, whatever it is doing.
        """
        self._waiting[request.id] = None
        try:
            answer = await self._decision(request)
        except BaseException:
            # Besides CancelledError also Ray's TaskCancelledError: of a cancelled request and its remote calls,
            # either can be the first to hear of it.
            self._settle(request.id, None)
            raise
        finally:
            del self._waiting[request.id]
            self._link.forget(request.id)
        if isinstance(answer, Reject):
            raise as_error(answer)
        self._held[request.id] = answer
        return answer

    async def _decision(self, request: Request) -> Grant | Reject:
        deadline = time.monotonic() + request.timeout_s
        while True:
            try:
                async with asyncio.timeout(request.timeout_s + 2 * SLACK_S):
                    answer = await self._arrive(request)
                if answer is None:
                    waits = self._actor.acquire.remote(self._holder, request)
                    answer = await within(request.timeout_s + SLACK_S, waits)
                return answer
            except (RayActorError, ConnectionError, TimeoutError) as error:
                left = deadline - time.monotonic()
                if left <= 0:
                    reason = "does not answer" if isinstance(error, TimeoutError) else "could not be reached"
                    raise errors.BackendTimeout(f"the scheduler {reason}", phase="queued") from None
            await asyncio.sleep(min(RETRY_S, left))
            request = request._replace(timeout_s=max(0.0, deadline - time.monotonic()))

    async def _arrive(self, request: Request) -> Answer:
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._pending_arrivals.append(_Arrival(request, time.monotonic() + request.timeout_s + SLACK_S, answer))
        self._has_arrivals.set()
        return await answer

    async def _send_arrivals(self) -> None:
        """Send the requests that arrived while the ones before them were on their way: a burst costs few round trips.

        One alone goes at once. A request that is cancelled before it is sent never is; afterwards, what was settled
        follows it, for calls to an actor keep their order.
        """
        while True:
            await self._has_arrivals.wait()
            self._has_arrivals.clear()
            batch = [each for each in self._pending_arrivals if not each.answer.done()]
            self._pending_arrivals.clear()
            if not batch:
                continue
            self._sent += 1
            if self._link.is_open:
                self._link.ask(self._holder, self._sent, [(each.request, each.answer) for each in batch])
                continue
            requests = [tuple(arrival.request) for arrival in batch]
            try:
                decisions = await self._answered(
                    self._actor.acquire_now.remote(self._holder, requests, self._sent), batch
                )
            except (RayActorError, TimeoutError) as error:
                _fail(batch, error)
                continue
            except BaseException:
                _fail(batch, errors.BackendUnavailable("the scheduler could not be asked", retry_after=1))
                raise
            for arrival, decision in zip(batch, decisions, strict=True):
                if not arrival.answer.done():
                    arrival.answer.set_result(unpacked(decision))

    async def _answered(self, called: Any, batch: list[_Arrival]) -> Any:
        """The answer to a message. Until it comes, requests whose time is up are failed, those that wait to be sent
        behind it, too: one timer for the message costs less than one for each request.
        """
        answer = effects.answer_of(called)
        try:
            gives_up_at = time.monotonic() + ANSWER_S
            while not (await asyncio.wait([answer], timeout=SLACK_S / 2))[0]:
                now = time.monotonic()
                if now >= gives_up_at:
                    raise TimeoutError
                _fail((each for each in [*batch, *self._pending_arrivals] if each.deadline <= now), TimeoutError())
            return answer.result()
        finally:
            answer.cancel()

    def release(self, lease: Grant, outcome: Outcome | None = None) -> None:
        """Give a lease back, and say how its request ended; does not wait."""
        self._held.pop(lease.request, None)
        self._settle(lease.request, lease.generation, outcome)

    def _settle(self, request: str, generation: int | None, outcome: Outcome | None = None) -> None:
        self._pending_releases.append((request, generation, outcome))
        self._has_releases.set()

    async def _send_releases(self) -> None:
        """Send what was given back, in as few messages as there are turns of the event loop.

        No answer is waited for: what a dying ledger did not hear is told by the next announcement.
        """
        while True:
            await self._has_releases.wait()
            self._has_releases.clear()
            settled, self._pending_releases = self._pending_releases, []
            if self._link.is_open:
                self._link.settle(settled)
            else:
                self._actor.settle.remote(settled)

    async def stay_linked(self, node: str) -> None:
        """Keep a socket to the ledger's process, from this one on `node`, and leases on it. Runs until cancelled.

        Without one, and until there is one again, they go through Ray.
        """
        while True:
            try:
                address = await within(ANSWER_S, self._actor.lease_address.remote(node))
                if address is None:
                    return
                await self._link.run(address, node)
            except (RayActorError, OSError):
                pass  # Among the latter are a connection's end and `TimeoutError`.
            except Exception:
                logger.exception("there is no socket to the ledger, trying again")
                await asyncio.sleep(FAULT_PAUSE_S)
            await asyncio.sleep(RETRY_S)

    async def waiting(self, request: str) -> Place | None:
        """Where a request waits; None when it does not, or the ledger does not answer."""
        try:
            return await within(ANSWER_S, self._actor.waiting.remote(request))  # type: ignore[no-any-return]
        except (RayActorError, TimeoutError):
            return None

    async def attach_holder(self, actor_id: str) -> None:
        """Announce this holder to every life of the ledger, and from time to time what it holds. Until cancelled."""

        def state() -> HolderState:
            assert self.configuration is not None, "a holder has a configuration"
            held, waiting = tuple(self._held.values()), tuple(self._waiting)
            is_guest = not self._makes_ledger
            return HolderState(self._holder, actor_id, self.configuration, held, waiting, self._sent, is_guest)

        async def say_alive() -> None:
            while True:
                await asyncio.sleep(ALIVE_PERIOD_S)
                self.tell("holder_alive", state())

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.stay_attached("attach_holder", state))
            tasks.create_task(supervised(say_alive))


def _fail(arrivals: Iterable[_Arrival], error: Exception) -> None:
    for arrival in arrivals:
        if not arrival.answer.done():
            arrival.answer.set_exception(error)
