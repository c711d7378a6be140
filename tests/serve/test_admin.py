"""The operators' routes and the ledger's policy over real Serve with the fake engine, on one pool with one GPU."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import hashlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from tests.pool import Pool, fake, loaded, running_pool

SLOW = fake(tokens_per_s=40, tokens=60)

MODELS = {
    "plain": {**fake(load_s=0.3, tokens=3), "aliases": ["p"]},
    "team/slow": {**SLOW, "target_inflight": 2},
    "late": fake(load_s=1.5, tokens=3),
    "broken": {**fake(load_s=0.1, fault="load_fails"), "fallbacks": ["small"]},
    "alone-broken": fake(fault="load_fails"),
    "by-hand": {**fake(tokens=3), "activation": "manual"},
    "giant": {**fake(), "memory_mib": 20_000},
    "big": {**SLOW, "num_gpus": 0.6, "target_inflight": 1, "cpu_offload_model": "small"},
    "lonely": {**SLOW, "num_gpus": 0.6, "target_inflight": 1},
    "small": fake(tokens=3),
    "old": {**fake(tokens=3), "aliases": ["chat"], "weight": 3},
    "new": {**fake(tokens=3), "aliases": ["chat"], "weight": 1},
    "left": {**fake(tokens=3), "num_gpus": 0.4, "group": "apart"},
    "right": {**fake(tokens=3), "num_gpus": 0.4, "group": "apart"},
    "guest": {**fake(tokens=3), "num_gpus": 0.4},
    "pair": {**fake(tokens=3), "num_gpus": 0.3, "max_replicas": 2},
}
POOL = {
    "models": MODELS,
    "capacity": 3,
    "mem_budget_mb": 10_000,
    "offload_queue_threshold": 2,
    "startup_timeout": 6,
    "admin_keys": [f"sha256:{hashlib.sha256(b'operator').hexdigest()}"],
}


@pytest.fixture(scope="module")
def pool(port: int) -> Iterator[Pool]:
    with running_pool(port, POOL) as pool:
        yield pool
        pool.check()


@pytest.fixture
def admin(pool: Pool) -> Iterator[Admin]:
    with httpx.Client(base_url=pool.url, headers={"Authorization": "Bearer operator"}, timeout=60) as http:
        yield Admin(http)


class Admin:
    def __init__(self, http: httpx.Client) -> None:
        self.http = http

    def rows(self) -> dict[str, Any]:
        return {row["name"]: row for row in self.http.get("/v1/admin/models").json()["models"]}

    def loaded(self) -> list[str]:
        return [name for name, row in self.rows().items() if row["runtime_state"] not in ("unloaded", "failed")]

    def clear(self) -> None:
        """Unload everything."""
        for name in self.loaded():
            assert self.unload(name).status_code == 200

    def load(self, model: str, **body: Any) -> httpx.Response:
        return self.http.post(f"/v1/admin/models/{model}/load", json=body or None)

    def unload(self, model: str) -> httpx.Response:
        return self.http.post(f"/v1/admin/models/{model}/unload")


def body(model: str, **fields: object) -> dict[str, object]:
    return {"model": model, "messages": [{"role": "user", "content": "hi"}], **fields}


def words(model: str, count: int) -> str:
    return "".join(f"{model}:{index} " for index in range(count))


def ask(pool: Pool, model: str, **fields: object) -> httpx.Response:
    return httpx.post(f"{pool.url}/v1/chat/completions", json=body(model, **fields), timeout=60)


def text_of(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"]


class Aside:
    """A call that runs in a thread until its result is asked for."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._result: Any = None
        self._thread = threading.Thread(target=self._run, args=(call,))
        self._thread.start()

    def _run(self, call: Callable[[], Any]) -> None:
        self._result = call()

    def result(self) -> Any:
        self._thread.join(60)
        return self._result


def test_load_and_unload_by_hand(pool: Pool, admin: Admin):
    answer = admin.load("p")
    assert (answer.status_code, answer.json()) == (200, {"status": "loaded", "model": "plain", "loaded_replicas": 1})
    row = admin.rows()["plain"]
    assert (row["runtime_state"], row["is_loaded"], row["loaded_replicas"]) == ("loaded", True, 1)
    assert row["vram_estimate_source"] == "unavailable"
    assert admin.load("plain").status_code == 200
    assert [row["id"] for row in admin.http.get("/admin/models").json()["models"]] == ["plain"]
    stopped = admin.http.post("/admin/models/plain/stop")
    assert (stopped.status_code, stopped.json()) == (200, {"status": "stopped", "model": "plain"})
    assert pool.ledger()["models"]["plain"]["state"] == "unloaded"
    assert admin.unload("plain").status_code == 200
    background = admin.http.post("/admin/models/load", json={"id": "plain", "path": "x"})
    assert (background.status_code, background.json()["status"]) == (202, "loading")
    pool.wait(lambda ledger: ledger["models"]["plain"]["state"] == "loaded")
    gone = admin.http.post("/admin/models/unload", json={"id": "plain"})
    assert (gone.status_code, gone.json()) == (200, {"model_id": "plain", "status": "unloaded"})
    assert admin.http.post("/admin/models/unload", json={"id": "plain"}).status_code == 404


@pytest.mark.parametrize(
    ("model", "content", "status", "code"),
    [
        ("nope", {}, 404, "unknown_model"),
        ("chat", {}, 404, "unknown_model"),
        ("plain", {"replicas": 2}, 400, "invalid_load_request"),
        ("plain", {"gguf_n_ctx": 512}, 400, "invalid_load_request"),
        ("plain", {"gguf_type_k": None}, 400, "invalid_load_request"),
        ("plain", {"gguf_n_ctx": 0}, 422, "invalid_request"),
        ("plain", {"wrong": 1}, 422, "invalid_request"),
    ],
)
def test_what_is_refused_says_why(admin: Admin, model: str, content: dict, status: int, code: str):
    before = admin.rows()
    answer = admin.load(model, **content)
    assert answer.status_code == status, answer.text
    assert answer.json()["detail"]["code"] == code
    assert answer.json()["detail"]["model"] == model
    assert answer.json()["error"]["message"]
    assert admin.rows() == before


def test_a_failed_load_leaves_nothing_and_may_be_tried_again(pool: Pool, admin: Admin):
    for _ in range(2):
        answer = admin.load("alone-broken")
        assert (answer.status_code, answer.json()["detail"]["code"]) == (500, "model_load_failed")
        ledger = pool.ledger()
        assert not any(row["devices"] for row in ledger["replicas"] if row["model"] == "alone-broken")
        row = admin.rows()["alone-broken"]
        assert row["runtime_state"] == "failed"
        assert "as configured" in row["last_error"]
    assert admin.unload("alone-broken").status_code == 200


def test_keys_guard_the_operators_routes_and_no_others(pool: Pool):
    with pool.http() as http:
        assert http.get("/v1/admin/models").status_code == 401
        assert http.post("/admin/models/plain/load").status_code == 401
        assert http.get("/v1/models").status_code == 200


def test_gpu_memory_without_a_driver_tells_the_reason(admin: Admin):
    answer = admin.http.get("/v1/admin/gpu-memory")
    assert answer.status_code == 200
    found = answer.json()
    assert {row["name"] for row in found["models"]} == set(MODELS)
    assert found["gpus"] or "NVIDIA" in found["error"]


def test_a_manual_model_waits_for_its_operator(pool: Pool, admin: Admin):
    refused = ask(pool, "by-hand")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "model_not_loaded")
    assert admin.load("by-hand").status_code == 200
    assert text_of(ask(pool, "by-hand")) == words("by-hand", 3)
    assert admin.unload("by-hand").status_code == 200
    assert ask(pool, "by-hand").status_code == 503


def test_an_unload_lets_the_running_finish_and_cancels_the_queued(pool: Pool, admin: Admin):
    started = admin.http.post("/v1/admin/models/team/slow/start")
    assert (started.status_code, started.json()) == (200, {"status": "started", "model": "team/slow"})
    running = [Aside(lambda: ask(pool, "team/slow", stream=True)) for _ in range(2)]
    pool.wait(lambda ledger: ledger["leases"] == 2)
    queued = Aside(lambda: ask(pool, "team/slow"))
    pool.wait(lambda ledger: ledger["models"]["team/slow"]["queued"] == 1)
    unloading = Aside(lambda: admin.unload("team/slow"))
    refused = queued.result()
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "model_unloading")
    assert admin.rows()["team/slow"]["runtime_state"] == "unloading"
    assert admin.load("team/slow").status_code == 409
    assert ask(pool, "team/slow").status_code == 409
    assert unloading.result().status_code == 200
    for stream in running:
        text = stream.result().text
        assert "team/slow:59 " in text
        assert text.endswith("data: [DONE]\n\n")
    assert admin.rows()["team/slow"]["runtime_state"] == "unloaded"


def test_what_loads_is_not_unloaded(pool: Pool, admin: Admin):
    loading = Aside(lambda: admin.load("late"))
    pool.wait(lambda ledger: ledger["models"]["late"]["state"] == "loading")
    refused = admin.unload("late")
    assert (refused.status_code, refused.json()["detail"]["code"]) == (409, "model_loading")
    assert loading.result().status_code == 200


def test_the_least_recently_used_makes_room_but_not_for_what_can_never_fit(pool: Pool, admin: Admin):
    admin.clear()
    for model in ("plain", "small", "by-hand"):
        admin.load(model)
    before = loaded_replicas(pool)
    for refused in (ask(pool, "giant"), admin.load("giant")):
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "MEMORY_BUDGET_EXCEEDED")
    assert loaded_replicas(pool) == before
    assert text_of(ask(pool, "plain")) == words("plain", 3)
    assert text_of(ask(pool, "guest")) == words("guest", 3)
    assert sorted(admin.loaded()) == ["by-hand", "guest", "plain"]


def test_beyond_the_threshold_requests_go_to_the_cpu_model(pool: Pool, admin: Admin):
    admin.load("big")
    admin.load("small")
    held = [Aside(lambda: ask(pool, "big", max_tokens=20)) for _ in range(3)]
    pool.wait(lambda ledger: ledger["models"]["big"]["queued"] == 2)
    offloaded = ask(pool, "big")
    assert text_of(offloaded) == words("small", 3)
    assert offloaded.json()["model"] == "small"
    assert [text_of(each.result()) for each in held] == [words("big", 20)] * 3


def test_without_a_cpu_model_they_are_refused(pool: Pool, admin: Admin):
    admin.load("lonely")
    held = [Aside(lambda: ask(pool, "lonely", max_tokens=20)) for _ in range(3)]
    pool.wait(lambda ledger: ledger["models"]["lonely"]["queued"] == 2)
    refused = ask(pool, "lonely")
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "GPU_OVERLOADED")
    assert [text_of(each.result()) for each in held] == [words("lonely", 20)] * 3


def test_a_model_that_fails_has_its_fallback(pool: Pool, admin: Admin):
    admin.load("small")
    for _ in range(2):
        answer = ask(pool, "broken")
        assert text_of(answer) == words("small", 3)
        assert answer.json()["model"] == "small"


def test_variants_share_their_name_by_weight(pool: Pool, admin: Admin):
    admin.load("old")
    admin.load("new")
    turns = collections.Counter(ask(pool, "chat").json()["model"] for _ in range(16))
    assert turns == {"old": 12, "new": 4}
    with pool.http() as http:
        row = http.get("/v1/models/chat").json()
    assert (row["id"], row["status"]) == ("chat", "loaded")
    assert row["variants"] == [{"model": "old", "weight": 3.0}, {"model": "new", "weight": 1.0}]


def test_a_group_that_stands_apart(pool: Pool, admin: Admin):
    """There is room for both on the one device, and yet one makes place for the other; a stranger may stay."""
    admin.clear()
    for model in ("guest", "left", "right"):
        assert text_of(ask(pool, model)) == words(model, 3)
    assert sorted(admin.loaded()) == ["guest", "right"]


def test_several_replicas_by_one_order(pool: Pool, admin: Admin):
    answer = admin.load("pair", replicas=2)
    assert (answer.status_code, answer.json()["loaded_replicas"]) == (200, 2)
    assert admin.rows()["pair"]["loaded_replicas"] == 2


async def test_a_process_that_does_not_stop_turns_the_pool_red(pool: Pool, admin: Admin):
    """`big` is told to stop for `lonely` while its process is suspended: work waits, and nothing moves."""
    await asyncio.to_thread(admin.load, "big")
    process = pid_of(pool, "big")
    waiting = asyncio.create_task(asyncio.to_thread(ask, pool, "lonely", max_tokens=3))
    os.kill(process, signal.SIGSTOP)
    try:
        reason = ""
        deadline = time.monotonic() + 40
        while "was told to stop" not in reason:
            assert time.monotonic() < deadline, f"still green: {reason}"
            await asyncio.sleep(0.2)
            answer = await asyncio.to_thread(httpx.get, f"{pool.url}/ready", timeout=10)
            reason = answer.json().get("reason", "")
        assert answer.status_code == 503
        assert reason.startswith("1 request(s) wait for lonely; ")
        assert "a replica of big was told to stop" in reason
    finally:
        # One that hangs beside its engine is ended by the pool itself, sooner or later.
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGCONT)
    assert text_of(await waiting) == words("lonely", 3)
    assert (await asyncio.to_thread(httpx.get, f"{pool.url}/ready")).status_code == 200


def loaded_replicas(pool: Pool) -> list[str]:
    ledger = pool.ledger()
    return [row["replica"] for model in ledger["models"] for row in loaded(ledger, model)]


def pid_of(pool: Pool, model: str) -> int:
    import ray

    replica = loaded(pool.ledger(), model)[0]
    actor = ray.get_actor(f"SERVE_REPLICA::slotpool#{model}#{replica['replica']}", namespace="serve")
    return int(ray._private.state.actors(actor._actor_id.hex())["Pid"])
