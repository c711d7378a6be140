"""The gateway of one process of another Ray job: an actor that asks the ledger as an ingress does, without HTTP.

`pool_handle` starts one beside each process that uses the pool, and Ray ends it with that process, however that ends:
the ledger then frees what it held or waited for, as with any holder of leases that dies. It is a guest: it never makes
a ledger, and keeps nothing of a pool that is taken down.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from cluster import errors
from cluster.client import LedgerClient
from cluster.ledger.events import Grant
from cluster.metrics import Outcome, family
from cluster.request import Request
from deployments import python_calls
from deployments.engines.protocol import Call
from deployments.gateway import Gateway
from deployments.handles import Handles
from deployments.requests import CHAT, parse_raw, parse_request

#: Stands where a request has its route: nothing is sent to an engine with a lease that is only held.
HELD = "/lease"


class Wanted(NamedTuple):
    """What a lease is asked for with. `id` is the asker's own; times are in seconds, None = as the model has it.

    `timeout_s` bounds the wait, `hold_s` the time from the grant on; neither can be more than the model's
    `request_timeout`.
    """

    id: str
    model: str
    slots: int = 1
    priority: str = "medium"
    timeout_s: float | None = None
    hold_s: float | None = None


class Granted(NamedTuple):
    """What was leased. `hold_s` is what is left of the time; `url` is that of the server the engine is in, if any."""

    model: str
    replica: str
    node: str | None
    devices: tuple[int, ...]
    slots: int
    hold_s: float
    url: str | None


@dataclass(eq=False)
class _Lease:
    """A lease that is held. It goes back when its time is over or it is given up, and nothing runs on it any more."""

    request: Request
    grant: Grant
    began: float
    ends_at: float
    turns: asyncio.Semaphore
    alarm: asyncio.TimerHandle | None = None
    running: set[asyncio.Task[Any]] = field(default_factory=set)
    is_over: bool = False
    is_released: bool = False


class JobGateway:
    """Every method raises the `PoolError` that HTTP would have answered."""

    async def __init__(self) -> None:  # type: ignore[misc]
        ledger = LedgerClient(holder=uuid.uuid4().hex)
        configuration = await ledger.newest_configuration()
        handles = Handles(configuration)
        self._gateway = Gateway(configuration, handles, ledger)
        self._gateway.on_configuration = [handles.follow]
        self._leases: dict[str, _Lease] = {}
        self._waiting: dict[str, asyncio.Task[Any]] = {}

    async def whole(self, path: str, body: dict[str, Any], lease: str | None = None) -> dict[str, Any]:
        """The object that a route answers to a body; on a lease that is held, if one is named."""
        if lease is None:
            return await python_calls.whole(self._gateway, path, body)
        return await python_calls.joined(self._on_lease(lease, {**body, "stream": False}))

    async def streamed(self, path: str, body: dict[str, Any], lease: str | None = None) -> AsyncGenerator[bytes, None]:
        """The parts of a streamed answer, for `python_calls.events_of`."""
        if lease is None:
            chunks = python_calls.streamed(self._gateway, path, body)
        else:
            chunks = self._on_lease(lease, {**body, "stream": True})
        async with contextlib.aclosing(chunks):
            async for chunk in chunks:
                yield chunk

    # --- leases that are held ---------------------------------------------------------------------------------------

    async def hold(self, wanted: Wanted) -> Granted:
        """Wait for a lease, and hold it until `give_back`, or until its time is over."""
        config = self._gateway.config
        headers = {"x-priority": wanted.priority}
        if wanted.timeout_s is not None:
            headers["x-request-timeout"] = str(wanted.timeout_s)
        request = parse_raw(config, HELD, wanted.model, request_id=uuid.uuid4().hex, headers=headers)
        request = request._replace(slots=wanted.slots)
        longest_s = config.request_timeout_s(request.model)
        hold_s = longest_s if wanted.hold_s is None else min(wanted.hold_s, longest_s)
        if wanted.slots < 1 or not hold_s > 0:
            raise errors.InvalidRequest("a lease has at least one slot, for some time")
        task = asyncio.current_task()
        assert task is not None
        self._waiting[wanted.id] = task
        try:
            grant = await self._gateway.ledger.acquire(request)
        finally:
            del self._waiting[wanted.id]
        loop = asyncio.get_running_loop()
        now = loop.time()
        lease = _Lease(request, grant, now, now + hold_s, asyncio.Semaphore(max(1, len(grant.slots))))
        lease.alarm = loop.call_later(hold_s, self._end, lease)
        self._leases[wanted.id] = lease
        node, url = await self._place(grant)
        slots = max(1, len(grant.slots))
        return Granted(grant.model, grant.replica, node, grant.devices, slots, lease.ends_at - loop.time(), url)

    async def _place(self, grant: Grant) -> tuple[str | None, str | None]:
        """The node of a lease, and where the server listens that its engine is in."""
        if self._gateway.config.server(grant.replica) is not None:
            return None, grant.replica
        rows = (await self._gateway.ledger.status()).replicas
        row = next((each for each in rows if each.replica == grant.replica), None)
        return (None, None) if row is None else (row.node, row.url)

    async def check(self, lease: str) -> None:
        """Raises `BackendTimeout` if the lease's time is over, `BackendUnavailable` if its replica is gone."""
        held = self._held(lease)
        if self._gateway.config.server(held.grant.replica) is not None:
            return
        rows = (await self._gateway.ledger.status()).replicas
        if all(each.replica != held.grant.replica or not each.leases for each in rows):
            raise errors.BackendUnavailable(f"the replica of {held.grant.model} went away", retry_after=1)

    async def give_back(self, lease: str) -> bool:
        """End a lease, or the wait for it; whether its time was over before. Of an unknown one: nothing."""
        waiting = self._waiting.get(lease)
        if waiting is not None:
            waiting.cancel()
        held = self._leases.pop(lease, None)
        if held is None:
            return False
        was_over = held.is_over
        self._end(held)
        return was_over

    def _held(self, lease: str) -> _Lease:
        held = self._leases.get(lease)
        if held is None or held.is_over:
            raise errors.BackendTimeout("the lease's time is over", phase="running")
        return held

    def _end(self, lease: _Lease) -> None:
        """Start no more calls on a lease, and release it once none runs."""
        lease.is_over = True
        if lease.alarm is not None:
            lease.alarm.cancel()
        if lease.is_released or lease.running:
            return
        lease.is_released = True
        request, grant = lease.request, lease.grant
        took_s = asyncio.get_running_loop().time() - lease.began + grant.queue_wait_s + grant.load_wait_s
        asked = grant.model, family(request.path), request.principal, request.priority
        waited = grant.queue_wait_s, grant.load_wait_s
        self._gateway.ledger.release(grant, Outcome(*asked, 200, *waited, total_s=took_s, trace=request.trace))

    async def _on_lease(self, lease: str, body: dict[str, Any]) -> AsyncGenerator[bytes, None]:
        """A chat on one slot of a lease, at most as many at a time as it has slots."""
        held = self._held(lease)
        wanted = {**body, "model": held.request.model}
        request, checked = parse_request(self._gateway.config, CHAT, wanted, request_id=uuid.uuid4().hex)
        task = asyncio.current_task()
        assert task is not None
        async with held.turns:
            self._held(lease)
            held.running.add(task)
            try:
                grant = held.grant._replace(slots=held.grant.slots[:1])
                left_s = min(request.timeout_s, held.ends_at - asyncio.get_running_loop().time())
                call = Call(request.path, checked, request.trace, priority=request.priority)
                async with contextlib.aclosing(self._gateway.on_lease(request, call, grant, left_s)) as chunks:
                    async for chunk in chunks:
                        yield chunk
            finally:
                held.running.discard(task)
                if held.is_over:
                    self._end(held)
