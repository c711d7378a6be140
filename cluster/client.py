"""The ledger as its callers see it: one round trip for a lease, one-way messages for everything else.

A ledger that dies comes back empty within a second. A lease that was being waited for is asked for again under the
same id, and the owner of this client is announced again. A ledger that hangs costs a caller no more than the time it
has given: every call is bounded here.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from typing import Any, NamedTuple

from ray.exceptions import RayActorError

from cluster import effects, errors
from cluster.announcements import HolderState
from cluster.changes import Changes
from cluster.config.version import Configuration
from cluster.lease_link import LeaseLink
from cluster.ledger.events import Grant, LoadRefused, Reject
from cluster.ledger.snapshot import Snapshot
from cluster.metrics import Outcome
from cluster.orders import Order
from cluster.parked import unpacked
from cluster.request import Request
from cluster.waiting import Place

logger = logging.getLogger("slotpool.client")

#: Pause between two attempts to reach a ledger that is being restarted, in seconds.
RETRY_S = 0.1
#: Pause after something that should never happen, in seconds.
FAULT_PAUSE_S = 1.0
#: For how long a call that concerns the whole pool looks for a ledger, in seconds.
PATIENCE_S = 30.0
#: How long the ledger may take for an answer that it does not park, in seconds.
ANSWER_S = 5.0
#: For how long a call parks in the ledger before it is made anew, in seconds.
PARKED_S = 30.0
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


class LedgerClient:
    """Speaks to the ledger actor from one event loop. Making one blocks for a moment.

    With a `configuration` it makes the ledger where there is none, and with a `holder` id it takes leases.
    """

    def __init__(self, configuration: Configuration | None = None, holder: str = "") -> None:
        self.configuration = configuration
        self._holder = holder
        self._actor: Any = _find(configuration)
        self._waiting: dict[str, None] = {}
        self._held: dict[str, Grant] = {}
        self._sent = 0
        self._link = LeaseLink()
        self._on_configuration: Callable[[Configuration], None] | None = None
        self._pending_arrivals: list[_Arrival] = []
        self._pending_releases: list[tuple[str, int | None, Outcome | None]] = []
        self._has_arrivals = asyncio.Event()
        self._has_releases = asyncio.Event()
        # Tasks of their own, because a request that is cancelled takes along the remote calls that it has made: Ray
        # cancels the children of a cancelled task, and a cancelled release is a slot lost.
        self._senders = [
            asyncio.create_task(_supervised(self._send_arrivals)),
            asyncio.create_task(_supervised(self._send_releases)),
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
                    answer = await _within(request.timeout_s + SLACK_S, waits)
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
                address = await _within(ANSWER_S, self._actor.lease_address.remote(node))
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
            return await _within(ANSWER_S, self._actor.waiting.remote(request))  # type: ignore[no-any-return]
        except (RayActorError, TimeoutError):
            return None

    # --- what the owner of this client says of itself -------------------------------------------------------------

    def tell(self, method: str, *args: Any) -> None:
        """A one-way message: `replica_progress`, `replica_ready`, `replica_failed`, `engine_died` and the like."""
        getattr(self._actor, method).remote(*args)

    async def attach_holder(self, actor_id: str) -> None:
        """Announce this holder to every life of the ledger, and from time to time what it holds. Until cancelled."""

        def state() -> HolderState:
            assert self.configuration is not None, "a holder has a configuration"
            held, waiting = tuple(self._held.values()), tuple(self._waiting)
            return HolderState(self._holder, actor_id, self.configuration, held, waiting, self._sent)

        async def say_alive() -> None:
            while True:
                await asyncio.sleep(ALIVE_PERIOD_S)
                self.tell("holder_alive", state())

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.stay_attached("attach_holder", state))
            tasks.create_task(_supervised(say_alive))

    async def stay_attached(self, method: str, state: Callable[[], Any]) -> None:
        """Announce `state()` through `method`, and again to every later life of the ledger. Runs until cancelled."""
        while True:
            try:
                attached: Awaitable[None] = getattr(self._actor, method).remote(state())
                await attached
                pause_s = RETRY_S  # A new life wants to hear it again, see `LedgerActor.attach_replica`.
            except RayActorError:
                pause_s = RETRY_S
            except Exception:
                logger.exception("could not stay attached to the ledger, trying again")
                pause_s = FAULT_PAUSE_S
            await asyncio.sleep(pause_s)
            try:
                # A detached actor can be gone for good, when somebody killed it with no_restart.
                self._actor = await asyncio.to_thread(_find, self.configuration)
            except Exception as error:
                logger.warning("there is no ledger: %s", error)

    # --- what the owner follows -------------------------------------------------------------------------------------

    async def follow_configuration(self, changed: Callable[[Configuration], None]) -> None:
        """Keep `configuration` as new as the ledger's, and call back with each new one. Runs until cancelled."""
        self._on_configuration = changed

        async def follow() -> None:
            assert self.configuration is not None, "there is something to begin with"
            self._adopt(await self._follow("config", self.configuration.version))

        await _supervised(follow)

    async def newest_configuration(self) -> Configuration:
        """The configuration that is in force now."""
        current: Configuration = await self._follow("config", (0.0, -1))
        self._adopt(current)
        return current

    async def replace_config(self, expected: tuple[float, int], configuration: Configuration) -> Configuration:
        """Put a changed configuration in force, if the one it was made from still is; the one in force afterwards.

        The change was taken if the answer equals it as a whole, for another's may have the same version.
        """
        current: Configuration = await self._patiently("replace_config", expected, configuration)
        self._adopt(current)
        return current

    def _adopt(self, current: Configuration) -> None:
        if self.configuration is None or current.version > self.configuration.version:
            self.configuration = current
            if self._on_configuration is not None:
                self._on_configuration(current)

    async def orders(self, replica: str, seen: int) -> tuple[int, Order]:
        """The next order to a replica after the version that it has seen. Waits for as long as there is none."""
        while True:
            version, order = await self._follow("orders", replica, seen)
            if order is not None:
                return version, order

    async def _follow(self, method: str, *args: Any) -> Any:
        """The answer of a call that parks for a while in the ledger, from whichever life of it answers."""
        while True:
            try:
                return await _within(PARKED_S + ANSWER_S, getattr(self._actor, method).remote(*args, PARKED_S))
            except (RayActorError, TimeoutError):
                await asyncio.sleep(RETRY_S)

    # --- operators and people -----------------------------------------------------------------------------------------

    async def status(self) -> Snapshot:
        """The ledger's snapshot. Raises `BackendUnavailable` while there is no ledger."""
        try:
            return await _within(ANSWER_S, self._actor.status.remote())  # type: ignore[no-any-return]
        except (RayActorError, TimeoutError):
            raise errors.BackendUnavailable("the scheduler is being restarted", retry_after=1) from None

    async def changes(self, epoch: str, version: int, timeout_s: float) -> Changes:
        """What happened behind the entry that was seen; parks for a while. Raises `BackendUnavailable` at once."""
        try:
            called = self._actor.changes.remote(epoch, version, timeout_s)
            return await _within(timeout_s + ANSWER_S, called)  # type: ignore[no-any-return]
        except (RayActorError, TimeoutError):
            raise errors.BackendUnavailable("the scheduler is being restarted", retry_after=1) from None

    async def metrics(self) -> bytes:
        """All figures as Prometheus text. Raises `BackendUnavailable` while there is no ledger."""
        try:
            return await _within(ANSWER_S, self._actor.metrics.remote())  # type: ignore[no-any-return]
        except (RayActorError, TimeoutError):
            raise errors.BackendUnavailable("the scheduler is being restarted", retry_after=1) from None

    async def load(self, model: str, replicas: int, overrides: Mapping[str, Any] | None = None) -> int:
        """Load so many replicas, all or none, and wait until they serve; the number that does.

        `overrides` are engine keys for this load only. Raises the `PoolError` that stands for a refusal or a failed
        load, and `BackendUnavailable` without a ledger.
        """
        return _replicas(await self._patiently("load", model, replicas, overrides))

    async def unload(self, model: str) -> None:
        """Unload a model and wait until it is gone. Raises the `PoolError` that stands for a refusal."""
        _replicas(await self._patiently("unload", model))

    async def check(self) -> str | None:
        """The first broken invariant of the ledger in words, or None."""
        return await _within(ANSWER_S, self._actor.check.remote())  # type: ignore[no-any-return]

    async def _patiently(self, method: str, *args: Any) -> Any:
        """The answer to a call that may park for long and may be made twice, whichever life of the ledger gives it.

        Raises `BackendUnavailable` where none is found, or one that answers nothing.
        """
        lost = 0
        while True:
            asked_at = time.monotonic()
            try:
                # A later life is told that this is asked again: what was changed by it may be in force already.
                again = {"again": True} if lost and method == "load" else {}
                return await self._while_alive(getattr(self._actor, method).remote(*args, **again))
            except TimeoutError:
                raise errors.BackendUnavailable("the scheduler does not answer", retry_after=1) from None
            except RayActorError:
                # A call that was parked for a while had found a ledger: the search begins anew.
                lost = lost + 1 if time.monotonic() - asked_at < 1.0 else 1
                if lost * RETRY_S > PATIENCE_S:
                    raise errors.BackendUnavailable("the scheduler could not be reached", retry_after=1) from None
            await asyncio.sleep(RETRY_S)

    async def _while_alive(self, parked: Any) -> Any:
        """The answer of a parked call, for as long as the ledger answers others; else raises `TimeoutError`."""
        answer = effects.answer_of(parked)
        try:
            while not (await asyncio.wait([answer], timeout=ANSWER_S))[0]:
                await _within(ANSWER_S, self._actor.waiting.remote(""))
            return answer.result()
        finally:
            answer.cancel()


def _find(configuration: Configuration | None) -> Any:
    if configuration is None:
        return effects.find_ledger()
    # Imported here: most processes find the ledger running, and need none of its code.
    from cluster.actor import LedgerActor

    return effects.get_or_create_ledger(LedgerActor, configuration)


async def _within(timeout_s: float, called: Any) -> Any:
    """The answer of a remote call; raises `TimeoutError` when it takes too long."""
    return await asyncio.wait_for(effects.answer_of(called), timeout_s)


def _fail(arrivals: Iterable[_Arrival], error: Exception) -> None:
    for arrival in arrivals:
        if not arrival.answer.done():
            arrival.answer.set_exception(error)


async def _supervised(run: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run it again whenever it ends, whatever made it end. Until cancelled."""
    while True:
        try:
            await run()
        except Exception:
            logger.exception("%s failed, beginning anew", run.__name__)
            await asyncio.sleep(FAULT_PAUSE_S)


def _replicas(ended: Any) -> int:
    if isinstance(ended, LoadRefused):
        raise as_error(ended)
    return int(ended.replicas)


def as_error(reject: Reject | LoadRefused) -> errors.PoolError:
    """The exception that a refusal of the ledger stands for."""
    kind: type[errors.PoolError] = getattr(errors, reject.error, errors.PoolError)
    extras = reject.extras
    if kind is errors.ModelNotFound:
        # The ledger knows nothing of HTTP's fields and routes.
        extras = {"param": "model", "install_endpoint": "/v1/models/install", **extras}
    return kind(reject.message, **extras)
