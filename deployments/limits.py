"""What a principal may use: requests a minute and at a time, and a budget for each day (CONTRACT section 8); and what
may be used of a remote model that costs money (section 6).

Rate and concurrency are this process's own count; a budget is counted in the pool's store, which all ingress replicas
share and which outlives them: what was used here is added to it every few seconds, and what the others have used is
learned by that. So a budget may be overdrawn by what runs in between, and no request waits for the database.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections import Counter
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from cluster import errors
from cluster.config import ApiKey, PoolConfig, RemoteModel
from cluster.config.keys import Budget
from cluster.request import Request
from deployments.run_info import RunInfo
from deployments.sse import is_comment

#: How often what was used is written down, in seconds.
SYNC_S = 2.0
DAY_S = 86_400
#: The longest name of an account, in characters.
MAX_ACCOUNT = 64
#: What begins an event of a stream, and how long a token is, roughly.
EVENT, BYTES_PER_TOKEN = b"data: {", 4


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


class _Limited(NamedTuple):
    """One budget that holds for a request: the account that it is counted in, whose it is in words, and its bounds."""

    account: str
    whose: str
    budget: Budget


class _Meter:
    """What a request has used, as its engine has told; or, where it could not tell any more, by what was seen of it.

    Who leaves in mid-stream gets no counts, and yet has used what was made for him: an event of a stream is taken for
    a token, and four bytes of a prompt.
    """

    def __init__(self, request: Request, info: RunInfo) -> None:
        self._info = info
        self._events = 0
        self.has_failed = False

    def count(self, chunk: bytes) -> None:
        if not is_comment(chunk):
            self._events += chunk.count(EVENT)

    def tokens(self) -> tuple[int, int]:
        """Of the prompt, and of what was made of it."""
        report, call = self._info.report, self._info.call
        prompt, output = report.prompt_tokens, report.output_tokens
        if prompt is None and output is None and call is not None and (self._events or not self.has_failed):
            asked = call.json.get("messages") or call.json.get("prompt") or ""
            return len(json.dumps(asked)) // BYTES_PER_TOKEN, self._events
        return prompt or 0, output or 0


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
        """Whether anything is limited for a request: for its sender, or in the use of its model."""
        return request.principal in self._keys or bool(self._remote_budgets(request))

    async def around(
        self, request: Request, info: RunInfo, chunks: AsyncGenerator[bytes, None]
    ) -> AsyncGenerator[bytes, None]:
        """The chunks of a request's answer, within the limits of its sender and its model.

        Raises `RateLimited` or `BudgetExceeded` before the first; `info` says afterwards what was used.
        """
        key = self._keys.get(request.principal)
        budgets = self._remote_budgets(request)
        if key is not None and key.budget is not None:
            budgets = [_Limited(key.name, f"the key {key.name!r}", key.budget), *budgets]
        meter = _Meter(request, info)
        try:
            await self._admit(key, budgets, is_remote=self._is_remote(request))
            if key is not None:
                self._running[key.name] += 1
            try:
                async for chunk in chunks:
                    meter.count(chunk)
                    yield chunk
            except errors.PoolError:
                meter.has_failed = True
                raise
            finally:
                if key is not None:
                    self._running[key.name] -= 1
                for limited in budgets:
                    self._spend(limited.account, self._used(request, info, meter))
        finally:
            await chunks.aclose()

    def _is_remote(self, request: Request) -> bool:
        model = self._config.models.get(request.model)
        return model is not None and model.is_remote

    def _remote_budgets(self, request: Request) -> list[_Limited]:
        """The budgets of a remote model: its own, and that of each key's use of it."""
        model = self._config.models.get(request.model)
        if not isinstance(model, RemoteModel):
            return []
        whose, use = f"the remote model {request.model!r}", f"{request.model} by {request.principal}"
        found = [
            (_account("model", request.model), whose, model.remote_budget),
            (_account("use", use), f"the key {request.principal!r} at {whose}", model.remote_budget_per_key),
        ]
        return [
            _Limited(account, who, Budget(requests=budget.requests, cost=budget.cost))
            for account, who, budget in found
            if budget is not None
        ]

    async def _admit(self, key: ApiKey | None, budgets: list[_Limited], *, is_remote: bool) -> None:
        if key is not None and key.max_concurrent is not None and self._running[key.name] >= key.max_concurrent:
            raise errors.RateLimited(
                f"the key {key.name!r} has {key.max_concurrent} requests running, which are all it may", retry_after=1
            )
        await self._learn([limited.account for limited in budgets])
        for limited in budgets:
            self._check_budget(limited, code="remote_budget_exceeded" if is_remote else None)
        if key is not None and key.requests_per_minute is not None:
            rate = RateLimitItemPerMinute(key.requests_per_minute)
            if not self._rates.hit(rate, key.name):
                reset_at = self._rates.get_window_stats(rate, key.name).reset_time
                raise errors.RateLimited(
                    f"the key {key.name!r} may send {key.requests_per_minute} requests a minute",
                    retry_after=max(1.0, reset_at - time.time()),
                )
        for limited in budgets:
            self._spend(limited.account, Used(requests=1))

    async def _learn(self, accounts: list[str]) -> None:
        """Know what all have used of these today."""
        unknown = [name for name in accounts if self._accounts.setdefault(name, _Account()).day != _today()]
        if unknown:
            await self._sync(unknown)

    def _check_budget(self, limited: _Limited, code: str | None) -> None:
        budget, account = limited.budget, self._accounts[limited.account]
        used = account.known.plus(account.unwritten)
        for name, limit in (("requests", budget.requests), ("tokens", budget.tokens), ("cost", budget.cost)):
            if limit is not None and getattr(used, name) >= limit:
                message = f"{limited.whose} has used its {name} of this day ({limit:g})"
                raise errors.BudgetExceeded(message, limit=name, code=code)

    def _used(self, request: Request, info: RunInfo, meter: _Meter) -> Used:
        prompt, output = meter.tokens()
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


def _account(kind: str, name: str) -> str:
    """The account of something that is no key: no key may have such a name."""
    account = f"{kind}={name}"
    return account if len(account) <= MAX_ACCOUNT else f"{kind}={hashlib.sha256(name.encode()).hexdigest()[:48]}"


def _today() -> int:
    return int(time.time() // DAY_S)
