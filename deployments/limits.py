"""What a principal may use: requests a minute and at a time, and a budget for each day (CONTRACT section 8).

Rate and concurrency are this process's own count; a budget is counted in the pool's store, which all ingress replicas
share and which outlives them: what was used here is added to it every few seconds, and what the others have used is
learned by that. So a budget may be overdrawn by what runs in between, and no request waits for the database.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from cluster import errors
from cluster.config import ApiKey, PoolConfig
from cluster.request import Request
from deployments.run_info import RunInfo

#: How often what was used is written down, in seconds.
SYNC_S = 2.0
DAY_S = 86_400


class Used(NamedTuple):
    """What was used of a budget on one day. `cost` is in the currency of the models' prices."""

    requests: int = 0
    tokens: int = 0
    cost: float = 0.0

    def plus(self, other: Used) -> Used:
        """Both together."""
        return Used(self.requests + other.requests, self.tokens + other.tokens, self.cost + other.cost)


class Tally(Protocol):
    """Where budgets are counted for all."""

    async def add(self, day: int, used: Mapping[str, Used]) -> dict[str, Used]:
        """Add to what each principal has used on a day (days since 1970, UTC); what it has used then. May raise."""


class OwnTally:
    """The budgets of one process alone."""

    def __init__(self) -> None:
        self._used: dict[tuple[int, str], Used] = {}

    async def add(self, day: int, used: Mapping[str, Used]) -> dict[str, Used]:
        for name, more in used.items():
            self._used[day, name] = self._used.get((day, name), Used()).plus(more)
        return {name: self._used[day, name] for name in used}


@dataclass(slots=True)
class _Account:
    """One principal's budget: what all have written down, and what this process has not yet."""

    day: int = -1
    known: Used = field(default_factory=Used)
    unwritten: Used = field(default_factory=Used)


class Limits:
    """The limits of all principals, for the requests of one process. Its methods belong on one event loop."""

    def __init__(self) -> None:
        self._tally: Tally = OwnTally()
        self._config = PoolConfig()
        self._keys: dict[str, ApiKey] = {}
        self._rates = MovingWindowRateLimiter(MemoryStorage())
        self._running: Counter[str] = Counter()
        self._accounts: dict[str, _Account] = {}
        self._syncing: asyncio.Task[None] | None = None

    def count_in(self, tally: Tally) -> None:
        """Where budgets are counted; before that, and without it, they hold for this process alone."""
        self._tally = tally

    def follow(self, config: PoolConfig) -> None:
        """From now on the limits are those of another configuration."""
        self._config = config
        self._keys = {key.name: key for key in (*config.api_keys, *config.admin_keys) if key.is_limited}

    def apply_to(self, request: Request) -> bool:
        """Whether anything is limited for the sender of a request."""
        return request.principal in self._keys

    async def around(
        self, request: Request, info: RunInfo, chunks: AsyncGenerator[bytes, None]
    ) -> AsyncGenerator[bytes, None]:
        """The chunks of a request's answer, within its sender's limits.

        Raises `RateLimited` or `BudgetExceeded` before the first; `info` says afterwards what was used.
        """
        key = self._keys[request.principal]
        try:
            await self._admit(key)
            self._running[key.name] += 1
            try:
                async for chunk in chunks:
                    yield chunk
            finally:
                self._running[key.name] -= 1
                if key.budget is not None:
                    self._spend(key.name, self._used(request, info))
        finally:
            await chunks.aclose()

    async def _admit(self, key: ApiKey) -> None:
        if key.max_concurrent is not None and self._running[key.name] >= key.max_concurrent:
            raise errors.RateLimited(
                f"the key {key.name!r} has {key.max_concurrent} requests running, which are all it may", retry_after=1
            )
        if key.budget is not None:
            await self._check_budget(key)
        if key.requests_per_minute is not None:
            rate = RateLimitItemPerMinute(key.requests_per_minute)
            if not self._rates.hit(rate, key.name):
                reset_at = self._rates.get_window_stats(rate, key.name).reset_time
                raise errors.RateLimited(
                    f"the key {key.name!r} may send {key.requests_per_minute} requests a minute",
                    retry_after=max(1.0, reset_at - time.time()),
                )

    async def _check_budget(self, key: ApiKey) -> None:
        budget = key.budget
        assert budget is not None, "asked for keys with one only"
        account = self._accounts.setdefault(key.name, _Account())
        if account.day != _today():
            await self._sync([key.name])
        used = account.known.plus(account.unwritten)
        for name, limit in (("requests", budget.requests), ("tokens", budget.tokens), ("cost", budget.cost)):
            if limit is not None and getattr(used, name) >= limit:
                raise errors.BudgetExceeded(
                    f"the key {key.name!r} has used its {name} of this day ({limit:g})", limit=name
                )
        account.unwritten = account.unwritten.plus(Used(requests=1))
        self._sync_soon()

    def _used(self, request: Request, info: RunInfo) -> Used:
        prompt, output = info.report.prompt_tokens or 0, info.report.output_tokens or 0
        model = self._config.models.get(info.model or request.model)
        price = None if model is None else model.price
        cost = 0.0 if price is None else (prompt * price.input + output * price.output) / 1e6
        return Used(0, prompt + output, cost)

    def _spend(self, principal: str, used: Used) -> None:
        account = self._accounts.setdefault(principal, _Account())
        account.unwritten = account.unwritten.plus(used)
        self._sync_soon()

    def _sync_soon(self) -> None:
        if self._syncing is None:
            self._syncing = asyncio.create_task(self._sync_later())

    async def _sync_later(self) -> None:
        await asyncio.sleep(SYNC_S)
        self._syncing = None
        await self._sync([name for name, account in self._accounts.items() if account.unwritten != Used()])

    async def _sync(self, principals: list[str]) -> None:
        """Write down what was used on the day that it was used, and learn what all have used of this one."""
        today = _today()
        for name in principals:
            account = self._accounts[name]
            day = today if account.day < 0 else account.day
            written, account.unwritten = account.unwritten, Used()
            try:
                totals = await self._tally.add(day, {name: written})
                if day != today:
                    totals = await self._tally.add(today, {name: Used()})
                account.known, account.day = totals[name], today
            except errors.BackendUnavailable:
                # It is away: what is known of a day holds for it, and this is written down with the next.
                account.unwritten = account.unwritten.plus(written)
                account.known = account.known if day == today else Used()


def _today() -> int:
    return int(time.time() // DAY_S)
