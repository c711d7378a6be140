"""Calls of the ledger that take no lease: what its callers say of themselves, follow, order and ask.

A ledger that dies comes back empty within a second: who has announced himself does so again, and what may be asked
twice is. Every call is bounded here, so a ledger that hangs costs a caller no more than the time it has given.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any

from ray.exceptions import RayActorError

from cluster import effects, errors
from cluster.changes import Changes
from cluster.config.version import Configuration
from cluster.ledger.events import LoadRefused, Reject
from cluster.ledger.snapshot import Snapshot
from cluster.orders import Order

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


class LedgerCalls:
    """Speaks to the ledger actor from one event loop. Making one blocks for a moment.

    With a `configuration` it makes the ledger where there is none.
    """

    def __init__(self, configuration: Configuration | None = None) -> None:
        self.configuration = configuration
        self._makes_ledger = configuration is not None
        self._actor: Any = _find(configuration)
        self._on_configuration: Callable[[Configuration], None] | None = None

    # --- what the owner of this client says of itself -------------------------------------------------------------

    def tell(self, method: str, *args: Any) -> None:
        """A one-way message: `replica_progress`, `replica_ready`, `replica_failed`, `engine_died` and the like."""
        getattr(self._actor, method).remote(*args)

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
                self._actor = await asyncio.to_thread(_find, self.configuration if self._makes_ledger else None)
            except Exception as error:
                logger.warning("there is no ledger: %s", error)

    # --- what the owner follows -------------------------------------------------------------------------------------

    async def follow_configuration(self, changed: Callable[[Configuration], None]) -> None:
        """Keep `configuration` as new as the ledger's, and call back with each new one. Runs until cancelled."""
        self._on_configuration = changed

        async def follow() -> None:
            assert self.configuration is not None, "there is something to begin with"
            self._adopt(await self._follow("config", self.configuration.version))

        await supervised(follow)

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
                return await within(PARKED_S + ANSWER_S, getattr(self._actor, method).remote(*args, PARKED_S))
            except (RayActorError, TimeoutError):
                await asyncio.sleep(RETRY_S)

    # --- operators and people -----------------------------------------------------------------------------------------

    async def status(self) -> Snapshot:
        """The ledger's snapshot. Raises `BackendUnavailable` while there is no ledger."""
        try:
            return await within(ANSWER_S, self._actor.status.remote())  # type: ignore[no-any-return]
        except (RayActorError, TimeoutError):
            raise errors.BackendUnavailable("the scheduler is being restarted", retry_after=1) from None

    async def changes(self, epoch: str, version: int, timeout_s: float) -> Changes:
        """What happened behind the entry that was seen; parks for a while. Raises `BackendUnavailable` at once."""
        try:
            called = self._actor.changes.remote(epoch, version, timeout_s)
            return await within(timeout_s + ANSWER_S, called)  # type: ignore[no-any-return]
        except (RayActorError, TimeoutError):
            raise errors.BackendUnavailable("the scheduler is being restarted", retry_after=1) from None

    async def metrics(self) -> bytes:
        """All figures as Prometheus text. Raises `BackendUnavailable` while there is no ledger."""
        try:
            return await within(ANSWER_S, self._actor.metrics.remote())  # type: ignore[no-any-return]
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
        return await within(ANSWER_S, self._actor.check.remote())  # type: ignore[no-any-return]

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
                await within(ANSWER_S, self._actor.waiting.remote(""))
            return answer.result()
        finally:
            answer.cancel()


def _find(configuration: Configuration | None) -> Any:
    if configuration is None:
        return effects.find_ledger()
    # Imported here: most processes find the ledger running, and need none of its code.
    from cluster.actor import LedgerActor

    return effects.get_or_create_ledger(LedgerActor, configuration)


async def within(timeout_s: float, called: Any) -> Any:
    """The answer of a remote call; raises `TimeoutError` when it takes too long."""
    return await asyncio.wait_for(effects.answer_of(called), timeout_s)


async def supervised(run: Callable[[], Coroutine[Any, Any, None]]) -> None:
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
