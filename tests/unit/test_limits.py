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
from deployments.engines.protocol import Call, Report
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


PRICE = {"input": 1, "output": 2}
REMOTE = {"backend": "openai_compatible", "remote_base_url": "https://api.example.com", "price": PRICE}
ASKED = Request("r", "far", principal="team")


def remote_limits(*, key: dict[str, object] | None = None, **keys: object) -> Limits:
    limits = Limits()
    api_keys = [{"name": "team", "key": f"sha256:{'0' * 64}", **(key or {})}]
    limits.follow(load_config({"models": {"far": {**REMOTE, **keys}}, "api_keys": api_keys}, environ={}))
    return limits


async def ask_far(limits: Limits, principal: str = "team", **used: int) -> None:
    info = RunInfo()
    chunks = limits.around(ASKED._replace(principal=principal), info, answer(info, **used))
    async with contextlib.aclosing(chunks):
        assert [chunk async for chunk in chunks] == [b"a", b"b"]


async def test_a_remote_model_has_a_budget_for_all_and_one_for_each_key():
    assert not remote_limits().apply_to(ASKED)
    limits = remote_limits(remote_budget={"requests": 3}, remote_budget_per_key={"requests": 2})
    assert limits.apply_to(ASKED)
    assert not limits.apply_to(ASKED._replace(model="other"))
    await ask_far(limits)
    await ask_far(limits)
    with pytest.raises(errors.BudgetExceeded, match="the key 'team' at the remote model 'far'") as refused:
        await ask_far(limits)
    assert (refused.value.status, refused.value.code) == (402, "remote_budget_exceeded")
    await ask_far(limits, "other")
    with pytest.raises(errors.BudgetExceeded, match=r"^the remote model 'far' has used its requests"):
        await ask_far(limits, "third")


async def test_the_cost_of_a_remote_model_counts_in_its_budget_and_its_keys():
    limits = remote_limits(remote_budget={"cost": 5}, key={"budget": {"cost": 4}})
    await ask_far(limits, prompt=1_000_000, output=1_500_000)
    with pytest.raises(errors.BudgetExceeded, match="the key 'team' has used its cost") as refused:
        await ask_far(limits)
    assert refused.value.code == "remote_budget_exceeded"
    await ask_far(limits, "other", output=1_000_000)
    with pytest.raises(errors.BudgetExceeded, match=r"the remote model 'far' has used its cost of this day \(5\)"):
        await ask_far(limits, "other")


async def test_who_is_refused_has_used_nothing():
    limits = remote_limits(remote_budget={"requests": 2}, key={"requests_per_minute": 1})
    await ask_far(limits)
    for _ in range(3):
        with pytest.raises(errors.RateLimited):
            await ask_far(limits)
    await ask_far(limits, "other")


async def test_who_leaves_in_mid_stream_has_used_what_was_made_for_him():
    limits = remote_limits(remote_budget={"cost": 0.0001})
    info = RunInfo(call=Call("", {"model": "far", "messages": [{"role": "user", "content": "x" * 400}]}, "r"))

    async def stream() -> AsyncGenerator[bytes, None]:
        yield b": queued\n\n"
        yield b"data: {}\n\ndata: {}\n\n"
        yield b"data: {}\n\n"

    chunks = limits.around(ASKED, info, stream())
    for _ in range(3):
        await anext(chunks)
    await chunks.aclose()
    with pytest.raises(errors.BudgetExceeded):
        await ask_far(limits)


async def test_a_failure_before_the_first_word_costs_a_request_and_no_tokens():
    limits = remote_limits(remote_budget={"cost": 0.0000001})
    info = RunInfo(call=Call("", {"model": "far", "messages": []}, "r"))

    async def fails() -> AsyncGenerator[bytes, None]:
        raise errors.BackendUnavailable("no")
        yield b""

    with pytest.raises(errors.BackendUnavailable):
        async for _ in limits.around(ASKED, info, fails()):
            pass
    await ask_far(limits)


async def test_accounts_have_short_names_that_no_key_can_have():
    name = limits_module._account("use", "m" * 100)
    assert len(name) <= limits_module.MAX_ACCOUNT
    assert name != limits_module._account("use", "m" * 101)
    assert "=" in name
