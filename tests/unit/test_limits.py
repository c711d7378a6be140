"""What a principal may use, with a gateway that is only asked for chunks."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from app.store import Store
from app.usage import Usage
from cluster import errors
from cluster.config import load_config
from cluster.config.store import StoreConfig
from cluster.request import Request
from deployments import limits as limits_module
from deployments.engines.protocol import Report
from deployments.limits import Limits, Used
from deployments.run_info import RunInfo

REQUEST = Request("r", "m", principal="team")
MODELS = {"m": {"backend": "fake", "price": {"input": 1, "output": 2}}}


def limits_of(**limited: object) -> Limits:
    key = {"name": "team", "key": f"sha256:{'0' * 64}", **limited}
    limits = Limits()
    limits.follow(load_config({"models": MODELS, "api_keys": [key]}, environ={}))
    return limits


async def answer(info: RunInfo, *, prompt: int = 0, output: int = 0) -> AsyncGenerator[bytes, None]:
    yield b"a"
    info.report = Report(prompt_tokens=prompt, output_tokens=output)
    yield b"b"


async def run(limits: Limits, **used: int) -> None:
    info = RunInfo()
    async with contextlib.aclosing(limits.around(REQUEST, info, answer(info, **used))) as chunks:
        assert [chunk async for chunk in chunks] == [b"a", b"b"]


async def test_who_has_no_limits_is_not_counted():
    assert not limits_of().apply_to(REQUEST)
    assert not limits_of(requests_per_minute=1).apply_to(REQUEST._replace(principal="other"))


async def test_so_many_at_a_time():
    limits = limits_of(max_concurrent=1)
    info = RunInfo()
    first = limits.around(REQUEST, info, answer(info))
    await anext(first)
    with pytest.raises(errors.RateLimited, match="all it may"):
        await run(limits)
    await first.aclose()
    await run(limits)


async def test_so_many_a_minute():
    limits = limits_of(requests_per_minute=2)
    await run(limits)
    await run(limits)
    with pytest.raises(errors.RateLimited, match="2 requests a minute") as refused:
        await run(limits)
    assert 1 <= refused.value.retry_after <= 60


@pytest.mark.parametrize(
    ("budget", "name"), [({"requests": 2}, "requests"), ({"tokens": 20}, "tokens"), ({"cost": 30e-6}, "cost")]
)
async def test_a_budget_for_a_day(budget: dict, name: str, monkeypatch: pytest.MonkeyPatch):
    today = 5
    monkeypatch.setattr(limits_module, "_today", lambda: today)
    limits = limits_of(budget=budget)
    await run(limits, prompt=5, output=5)
    await run(limits, prompt=5, output=5)
    with pytest.raises(errors.BudgetExceeded) as refused:
        await run(limits)
    assert (refused.value.status, refused.value.extras) == (402, {"limit": name})
    today = 6
    await run(limits)


async def test_budgets_are_counted_for_all_and_outlive_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(limits_module, "SYNC_S", 0.01)
    stores = [Store(StoreConfig(folder=str(tmp_path))) for _ in range(2)]
    one, other = (limits_of(budget={"tokens": 25}) for _ in stores)
    for limits, store in zip((one, other), stores, strict=True):
        limits.count_in(Usage(store))
    await run(one, prompt=5, output=5)
    await run(other, prompt=5, output=5)
    await asyncio.sleep(0.1)
    await run(one, prompt=5, output=5)
    await asyncio.sleep(0.1)
    with pytest.raises(errors.BudgetExceeded):
        await run(one)
    reborn = limits_of(budget={"tokens": 25})
    reborn.count_in(Usage(stores[0]))
    with pytest.raises(errors.BudgetExceeded):
        await run(reborn)
    for store in stores:
        store.close()


async def test_a_store_that_is_away_costs_nobody_an_answer(monkeypatch: pytest.MonkeyPatch):
    """What was used meanwhile is written down once it is back."""
    monkeypatch.setattr(limits_module, "SYNC_S", 0.01)
    written: dict[str, Used] = {}
    is_away = True

    class Tally:
        async def add(self, day: int, used: dict[str, Used]) -> dict[str, Used]:
            if is_away:
                raise errors.BackendUnavailable("away")
            for name, more in used.items():
                written[name] = written.get(name, Used()).plus(more)
            return dict(written)

    limits = limits_of(budget={"requests": 3})
    limits.count_in(Tally())
    await run(limits, output=1)
    await asyncio.sleep(0.05)
    is_away = False
    await run(limits, output=1)
    await asyncio.sleep(0.05)
    assert written["team"] == Used(2, 2, 4e-6)
