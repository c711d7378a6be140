"""Waiting for slots of a server pool: order, deadlines, cancellations, dying servers, and a random crowd."""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter

import pytest

from cluster import (
    ConcurrentDispatcher,
    DispatcherTimeoutError,
    ModelNotAvailableError,
    NoModelsAvailableError,
    ServerConfig,
    ServerPool,
)
from cluster.ledger.events import ServerManifest
from tests.unit.stocked import A, B, check, idle, stocked

# --- waiting --------------------------------------------------------------------------------------------------------


async def soon(task: asyncio.Task[str]) -> str:
    return await asyncio.wait_for(asyncio.shield(task), 5)


async def waiting(pool: ServerPool, count: int) -> None:
    while pool._ledger.snapshot().queued != count:
        await asyncio.sleep(0)


async def test_waiters_are_served_in_order():
    pool = stocked(A)
    dispatcher = ConcurrentDispatcher(pool)
    held = await dispatcher.submit("m")
    order = []

    async def one(name: str) -> None:
        url = await dispatcher.submit("m", timeout=None)
        order.append(name)
        pool.release_server(url)

    tasks = []
    for name in "abcde":
        tasks.append(asyncio.create_task(one(name)))
        await waiting(pool, len(tasks))
    assert pool.find_and_acquire("m") is None
    pool.release_server(held)
    await asyncio.gather(*tasks)
    assert "".join(order) == "abcde"
    assert idle(pool)


async def test_an_idle_server_goes_to_who_came_first_whatever_the_model():
    pool = stocked(A)
    dispatcher = ConcurrentDispatcher(pool)
    held = await dispatcher.submit("m")
    first = asyncio.create_task(dispatcher.submit("n"))
    await waiting(pool, 1)
    second = asyncio.create_task(dispatcher.submit("m"))
    await waiting(pool, 2)
    pool.release_server(held)
    held = await soon(first)
    assert not second.done()
    assert pool.servers[A].current_model == "n"
    pool.release_server(held)
    pool.release_server(await soon(second))
    assert idle(pool)


async def test_a_blocked_model_blocks_no_other():
    pool = ServerPool([A, B])
    pool._post(ServerManifest(A, ("m",)))
    pool._post(ServerManifest(B, ("n",)))
    dispatcher = ConcurrentDispatcher(pool)
    await dispatcher.submit("m")
    blocked = asyncio.create_task(dispatcher.submit("m"))
    await waiting(pool, 1)
    assert await dispatcher.submit("n", timeout=1) == B
    blocked.cancel()
    await asyncio.wait([blocked])
    check(pool)


async def test_an_overlapping_flow_starves_nobody():
    pool = stocked(A, max_concurrent=2, patience_s=0.2)
    dispatcher = ConcurrentDispatcher(pool)
    stop = asyncio.Event()

    async def flow(offset_s: float) -> None:
        await asyncio.sleep(offset_s)
        while not stop.is_set():
            url = await dispatcher.submit("m")
            await asyncio.sleep(0.02)
            pool.release_server(url)

    flows = [asyncio.create_task(flow(index * 0.005)) for index in range(4)]
    await asyncio.sleep(0.05)
    pool.release_server(await dispatcher.submit("n", timeout=5))
    stop.set()
    await asyncio.gather(*flows)
    assert idle(pool)


async def test_a_deadline_is_an_error_of_its_own_and_leaves_nothing():
    pool = stocked(A)
    dispatcher = ConcurrentDispatcher(pool)
    url = await dispatcher.submit("m", timeout=0)
    with pytest.raises(DispatcherTimeoutError, match=r"within 0.05 s"):
        await dispatcher.submit("m", timeout=0.05)
    with pytest.raises(TimeoutError):
        await dispatcher.submit("m", timeout=0)
    pool.release_server(url)
    assert idle(pool)


async def test_errors_tell_no_models_from_no_such_model():
    with pytest.raises(NoModelsAvailableError):
        await ConcurrentDispatcher(ServerPool([A])).submit("m")
    with pytest.raises(NoModelsAvailableError):
        await ConcurrentDispatcher(ServerPool()).submit("m")
    with pytest.raises(ModelNotAvailableError, match="there are: m, n"):
        await ConcurrentDispatcher(stocked(A)).submit("x")


async def test_who_waits_for_a_server_that_dies_hears_of_it_at_once():
    pool = stocked(A, B, models="m")
    pool._post(ServerManifest(B, ("m", "n")))
    dispatcher = ConcurrentDispatcher(pool)
    held = [await dispatcher.submit("m"), await dispatcher.submit("m")]
    for_m, for_n = (asyncio.create_task(dispatcher.submit(model)) for model in "mn")
    await waiting(pool, 2)
    pool.report_server_error(B, ConnectionResetError())
    with pytest.raises(ModelNotAvailableError):
        await soon(for_n)
    assert pool.servers[B].last_refresh_error == "ConnectionResetError"
    assert not for_m.done()
    pool.report_server_error(held[0], "boom")
    with pytest.raises(NoModelsAvailableError, match="boom"):
        await soon(for_m)
    for url in held:
        pool.release_server(url)
    assert idle(pool)


async def test_more_slots_at_run_time_wake_those_who_wait():
    pool = stocked(A)
    dispatcher = ConcurrentDispatcher(pool)
    urls = [await dispatcher.submit("m")]
    tasks = [asyncio.create_task(dispatcher.submit("m")) for _ in range(2)]
    await waiting(pool, 2)
    pool.set_max_concurrent(3)
    urls += [await soon(task) for task in tasks]
    assert pool.servers[A].active_requests == 3
    pool.set_max_concurrent(1)
    late = asyncio.create_task(dispatcher.submit("m"))
    await waiting(pool, 1)
    pool.release_server(urls[0])
    pool.release_server(urls[1])
    assert not late.done()
    pool.release_server(urls[2])
    assert await soon(late) == A
    with pytest.raises(ValueError, match="at least 1"):
        pool.set_max_concurrent(0)


async def test_a_submit_that_is_cancelled_in_the_moment_of_its_grant_holds_nothing():
    pool = stocked(A)
    dispatcher = ConcurrentDispatcher(pool)
    held = await dispatcher.submit("m")
    late = asyncio.create_task(dispatcher.submit("m"))
    await waiting(pool, 1)
    # The slot is granted, and before the task runs again it is cancelled.
    pool.release_server(held)
    assert pool.servers[A].active_requests == 1
    late.cancel()
    with pytest.raises(asyncio.CancelledError):
        await late
    assert idle(pool)


async def test_wait_for_around_a_submit_leaks_nothing():
    pool = stocked(A)
    dispatcher = ConcurrentDispatcher(pool)
    for spin in range(200):
        held = await dispatcher.submit("m")
        asyncio.get_running_loop().call_later(0.001, pool.release_server, held)
        try:
            url = await asyncio.wait_for(dispatcher.submit("m"), 0.001 + (spin % 5 - 2) * 1e-4)
        except TimeoutError:
            await asyncio.sleep(0.003)
        else:
            pool.release_server(url)
        assert idle(pool)


async def test_a_slot_freed_in_another_thread_reaches_its_waiter():
    pool = stocked(A)
    dispatcher = ConcurrentDispatcher(pool)
    held = await dispatcher.submit("m")
    late = asyncio.create_task(dispatcher.submit("m"))
    await waiting(pool, 1)
    await asyncio.to_thread(pool.release_server, held)
    pool.release_server(await soon(late))
    assert idle(pool)


def test_a_waiter_whose_loop_was_closed_gives_its_slot_back():
    pool = stocked(A)
    held = pool.find_and_acquire("m")
    loop = asyncio.new_event_loop()
    task = loop.create_task(ConcurrentDispatcher(pool).submit("m"))
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    threading.Thread(target=pool.release_server, args=(held,)).start()
    while pool._held or pool._takers:
        pass
    assert idle(pool)
    task.get_coro().close()
    task._log_destroy_pending = False


@pytest.mark.parametrize("seed", range(6))
async def test_a_random_crowd_leaves_nothing_and_is_never_over_granted(seed):
    rng = random.Random(seed)
    limits = {A: rng.randint(1, 3), B: rng.randint(1, 3), "http://c:1": 2}
    types = {A: "lmstudio", B: None, "http://c:1": "vllm"}
    pool = stocked(
        *(ServerConfig(u, n, server_type=types[u]) for u, n in limits.items()), models="m n o", patience_s=0.05
    )
    dispatchers = [ConcurrentDispatcher(pool) for _ in range(2)]
    running: dict[str, Counter[str]] = {url: Counter() for url in limits}
    outcomes: Counter[str] = Counter()

    async def client() -> None:
        await asyncio.sleep(rng.random() * 0.5)
        model = rng.choice("mno")
        try:
            url = await rng.choice(dispatchers).submit(model, timeout=rng.choice((0.02, 0.2, 20.0, None)))
        except (DispatcherTimeoutError, ModelNotAvailableError, NoModelsAvailableError) as error:
            outcomes[type(error).__name__] += 1
            return
        running[url][model] += 1
        assert running[url].total() <= limits[url]
        if types[url] != "vllm":
            assert len(+running[url]) == 1, f"{url} runs {+running[url]}"
        try:
            await asyncio.sleep(rng.random() * 0.01)
        finally:
            running[url][model] -= 1
            pool.release_server(url)
            if rng.random() < 0.1:
                pool.release_server(url)
        outcomes["served"] += 1

    async def trouble() -> None:
        for _ in range(12):
            await asyncio.sleep(0.04)
            url = rng.choice(list(limits))
            pool.report_server_error(url, "trouble")
            await asyncio.sleep(0.01)
            pool._post(ServerManifest(url, ("m", "n", "o")))
            check(pool)

    tasks = [asyncio.create_task(client()) for _ in range(400)]
    for task in rng.sample(tasks, 120):
        asyncio.get_running_loop().call_later(rng.random() * 0.6, task.cancel)
    results = await asyncio.gather(*tasks, trouble(), return_exceptions=True)
    wrong = [each for each in results if each is not None and not isinstance(each, asyncio.CancelledError)]
    assert not wrong
    assert outcomes["served"] > 100
    assert idle(pool)
