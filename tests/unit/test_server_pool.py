"""The scheduler as a library: manifests over real HTTP, slots, waits, cancellations, and a random crowd."""

from __future__ import annotations

import asyncio
import logging
import random
import subprocess
import sys
import threading
from collections import Counter

import pytest

import cluster
from cluster import (
    ConcurrentDispatcher,
    DispatcherTimeoutError,
    ModelNotAvailableError,
    NoModelsAvailableError,
    ServerConfig,
    ServerPool,
)
from cluster.ledger.events import ServerManifest
from tests.upstream import Upstream

A, B = "http://a:1", "http://b:1"


def stocked(*urls: str | ServerConfig, models: str = "m n", **options: float) -> ServerPool:
    """A pool whose manifests were read, without HTTP."""
    pool = ServerPool(urls, **options)
    for url in pool.servers:
        pool._post(ServerManifest(url, tuple(models.split())))
    return pool


def check(pool: ServerPool) -> None:
    pool._ledger.check()


def idle(pool: ServerPool) -> bool:
    check(pool)
    snapshot = pool._ledger.snapshot()
    return not (snapshot["leases"] or snapshot["queued"] or pool._held or pool._takers)


# --- the package ----------------------------------------------------------------------------------------------------


def test_the_library_never_imports_ray():
    code = (
        "import sys, cluster\n"
        "from cluster import ServerPool, ConcurrentDispatcher, ServerConfig\n"
        "import asyncio; asyncio.run(ServerPool(['http://127.0.0.1:9']).refresh_all_manifests())\n"
        "assert not [name for name in sys.modules if name.split('.')[0] == 'ray']"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_names_and_their_bases():
    assert issubclass(NoModelsAvailableError, RuntimeError)
    assert issubclass(ModelNotAvailableError, ValueError)
    assert issubclass(DispatcherTimeoutError, TimeoutError)
    with pytest.raises(AttributeError, match="Nonsense"):
        cluster.Nonsense


# --- manifests ------------------------------------------------------------------------------------------------------


async def test_manifests_are_read_over_http_and_a_failure_is_only_that_servers():
    one, two = Upstream("m", "n"), Upstream("n", "o")
    with one.listening(), two.listening():
        # Both ways to write a URL are common; it is handed out as it was given.
        pool = ServerPool([one.url, f"{two.url}/v1/", "http://127.0.0.1:9"])
        assert pool.get_all_available_models() == set()
        await pool.refresh_all_manifests()
        assert pool.get_all_available_models() == {"m", "n", "o"}
        assert pool.servers[one.url].available_models == ["m", "n"]
        assert "cannot be connected to" in pool.servers["http://127.0.0.1:9"].last_refresh_error
        assert pool.find_and_acquire("o") == f"{two.url}/v1/"
        one.manifest_fault = 500
        await pool.refresh_all_manifests()
        assert pool.servers[one.url].last_refresh_error == "its list of models answered with status 500"
        assert pool.find_and_acquire("m") is None
        one.manifest_fault = None
        await pool.refresh_all_manifests()
        assert pool.servers[one.url].last_refresh_error is None
        assert pool.find_and_acquire("m") == one.url


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("garbage", "something else than a list"),
        ("nameless", "models without a name"),
        (401, "status 401"),
        ("deaf", "did not answer in time"),
    ],
)
async def test_whatever_a_server_answers_it_has_a_reason(fault, reason, monkeypatch):
    monkeypatch.setattr("cluster.servers.TIMEOUT_S", 0.3)
    with (upstream := Upstream("m")).listening():
        upstream.manifest_fault = fault
        pool = ServerPool([upstream.url])
        await pool.refresh_all_manifests()
        assert reason in pool.servers[upstream.url].last_refresh_error


async def test_a_key_comes_from_the_environment_and_shows_nowhere(monkeypatch):
    monkeypatch.setenv("UPSTREAM_KEY", "s3cret")
    with (upstream := Upstream("m")).listening():
        pool = ServerPool([ServerConfig(upstream.url, api_key_env="UPSTREAM_KEY")])
        await pool.refresh_all_manifests()
        assert upstream.keys == ["Bearer s3cret"]
        assert "s3cret" not in repr(pool) + repr(pool.servers)
        monkeypatch.delenv("UPSTREAM_KEY")
        await pool.refresh_all_manifests()
        assert pool.servers[upstream.url].last_refresh_error == "the environment variable UPSTREAM_KEY is not set"


async def test_a_url_that_is_none_has_a_reason():
    pool = ServerPool(["http://[bad", "gopher://x"])
    await pool.refresh_all_manifests()
    assert all(server.last_refresh_error for server in pool.servers.values())


# --- slots ----------------------------------------------------------------------------------------------------------


def test_the_state_of_a_server():
    pool = stocked(ServerConfig(A, max_concurrent=2))
    server = pool.servers[A]
    assert (server.active_requests, server.current_model, server.is_busy) == (0, None, False)
    first = pool.find_and_acquire("m")
    assert first == A
    assert (server.active_requests, server.current_model, server.is_busy) == (1, "m", False)
    second = pool.find_and_acquire("m")
    assert server.is_busy
    assert repr(pool) == f"<ServerPool {A} 2/2>"
    pool.release_server(first)
    pool.release_server(second)
    assert (server.active_requests, server.current_model, server.is_busy) == (0, None, False)
    loose = ServerConfig(B)
    assert (loose.available_models, loose.last_refresh_error, loose.is_busy) == ([], None, False)
    assert repr(ServerPool()) == "<ServerPool empty>"
    with pytest.raises(ValueError, match="at least 1"):
        ServerConfig(B, max_concurrent=0)


def test_the_guard():
    pool = stocked(A, ServerConfig(B, 2, server_type="vllm"), max_concurrent=2)
    assert [pool.find_and_acquire("m"), pool.find_and_acquire("m")] == [A, B]
    # A would have to swap under a running request; B runs both at once.
    assert pool.find_and_acquire("n") == B
    assert pool.find_and_acquire("n") is None
    assert pool.find_and_acquire("m") == A
    check(pool)


def test_least_loaded_first_and_ties_in_turn():
    pool = stocked(A, B, max_concurrent=3)
    assert [pool.find_and_acquire("m") for _ in range(6)] == [A, B, A, B, A, B]
    assert pool.find_and_acquire("m") is None
    for _ in range(2):
        pool.release_server(B)
    assert [pool.find_and_acquire("m") for _ in range(3)] == [B, B, None]


def test_unknown_models_and_pools_without_any():
    assert ServerPool([A]).find_and_acquire("m") is None
    assert stocked(A).find_and_acquire("x") is None


def test_an_extra_release_is_logged_and_frees_nobody_elses_slot(caplog):
    pool = stocked(A, max_concurrent=2)
    mine, yours = pool.find_and_acquire("m"), pool.find_and_acquire("m")
    pool.release_server(mine)
    with caplog.at_level(logging.WARNING):
        pool.release_server(mine)
        pool.release_server("http://nobody")
    assert caplog.text.count("ignored") == 2
    assert pool.servers[A].active_requests == 1
    # The text alone will do, too.
    assert str(yours) == A
    pool.release_server(A)
    pool.release_server(A)
    assert pool.servers[A].active_requests == 0
    assert idle(pool)


def test_threads_share_a_pool():
    pool = stocked(A, B, max_concurrent=4)
    active, peaks, lock = Counter(), Counter(), threading.Lock()

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(200):
            url = pool.find_and_acquire("m")
            if url is None:
                continue
            with lock:
                active[str(url)] += 1
                peaks[str(url)] = max(peaks[str(url)], active[str(url)])
            if rng.random() < 0.2:
                threading.Event().wait(0.0001)
            with lock:
                active[str(url)] -= 1
            pool.release_server(url)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(peaks.values()) <= 4
    assert idle(pool)


# --- waiting --------------------------------------------------------------------------------------------------------


async def soon(task: asyncio.Task[str]) -> str:
    return await asyncio.wait_for(asyncio.shield(task), 5)


async def waiting(pool: ServerPool, count: int) -> None:
    while pool._ledger.snapshot()["queued"] != count:
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
