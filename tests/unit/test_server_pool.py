"""The scheduler as a library: the package, manifests over real HTTP, slots."""

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
from tests.unit.stocked import A, B, check, idle, stocked
from tests.upstream import Upstream

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
    monkeypatch.setattr("cluster.servers.manifests.TIMEOUT_S", 0.3)
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


def test_the_text_of_a_slot_is_the_slot(caplog):
    pool = stocked(A, max_concurrent=2)
    mine, yours = pool.find_and_acquire("m"), pool.find_and_acquire("m")
    pool.release_server(str(mine))
    with caplog.at_level(logging.WARNING):
        pool.release_server(str(mine))
    assert caplog.text.count("ignored") == 1
    assert pool.servers[A].active_requests == 1
    pool.release_server(str(yours))
    assert idle(pool)


async def test_who_leaves_at_its_deadline_takes_nobodys_answer_with_it():
    pool = stocked(A)
    held = pool.find_and_acquire("m")
    submit = ConcurrentDispatcher(pool).submit
    leaves, stays = asyncio.create_task(submit("m", 0.05)), asyncio.create_task(submit("m", 0.05))
    await asyncio.sleep(0)
    # The deadline passes while this thread is busy, so the next that the ledger hears is the cancellation.
    threading.Event().wait(0.1)
    leaves.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaves
    with pytest.raises(DispatcherTimeoutError):
        await asyncio.wait_for(stays, 5)
    pool.release_server(held)
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
