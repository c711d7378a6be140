"""The allocator's family, and the service routes around it, over real Serve with the fake engine."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.pool import Pool, fake, running_pool

MODELS = {
    "quick": {**fake(tokens=3), "num_gpus": 1},
    "slow": {**fake(tokens=40, tokens_per_s=20), "num_gpus": 1, "target_inflight": 1},
    "endless": {**fake(tokens=1000, tokens_per_s=10), "target_inflight": 1},
}


@pytest.fixture(scope="module")
def pool(port: int) -> Iterator[Pool]:
    with running_pool(port, {"models": MODELS, "queue_max_size": 2}) as pool:
        yield pool
        pool.check()


@pytest.fixture
def http(pool: Pool) -> Iterator[httpx.Client]:
    with pool.http() as http:
        yield http


def ask(http: httpx.Client, model: str, **fields: object) -> httpx.Response:
    return http.post("/api/v1/inference", json={"model_id": model, "prompt": "x", **fields})


def test_one_prompt_one_answer(http: httpx.Client):
    answer = ask(http, "quick", request_id="mine", priority="HIGH")
    assert answer.status_code == 200
    body = answer.json()
    assert body.pop("inference_time_ms") > 0
    said = {"request_id": "mine", "model_id": "quick", "output": "quick:0 quick:1 quick:2 ", "gpu_id": 0}
    assert body == said
    assert ask(http, "quick").json()["request_id"]


def test_beyond_its_queue_the_pool_is_full_and_says_so(pool: Pool, http: httpx.Client):
    with ThreadPoolExecutor(3) as threads:
        running = threads.submit(ask, http, "slow")
        pool.wait(lambda ledger: ledger["leases"] == 1)
        waiting = [threads.submit(ask, http, "slow") for _ in range(2)]
        pool.wait(lambda ledger: ledger["queued"] == 2)
        assert http.get("/api/v1/status").json() == {"queue_size": 2, "gpus_available": 0, "gpus_busy": 1}
        refused = ask(http, "slow")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "GPU_OVERLOADED")
        assert "queue" in refused.json()["detail"]
        assert int(refused.headers["Retry-After"]) >= 1
        assert [each.result().status_code for each in (running, *waiting)] == [200] * 3
    assert http.get("/api/v1/status").json() == {"queue_size": 0, "gpus_available": 1, "gpus_busy": 0}


def test_what_takes_too_long_frees_its_slot(pool: Pool, http: httpx.Client):
    late = http.post(
        "/api/v1/inference", json={"model_id": "endless", "prompt": "x"}, headers={"X-Request-Timeout": "1"}
    )
    assert late.status_code == 504
    assert "timeout" in late.json()["detail"]
    pool.wait(lambda ledger: ledger["leases"] == 0, 3)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"model_id": "nobody", "prompt": "x"}, 404),
        ({"model_id": "quick"}, 422),
        ({"prompt": "x"}, 422),
        ({"model_id": "quick", "prompt": 7}, 422),
        ({"model_id": "quick", "prompt": "x", "priority": "soon"}, 422),
        ({"model_id": "quick", "prompt": "x", "unknown": 1}, 422),
        ([], 422),
    ],
)
def test_a_bad_body_is_refused(http: httpx.Client, body: object, status: int):
    answer = http.post("/api/v1/inference", json=body)
    assert answer.status_code == status, answer.text
    assert isinstance(answer.json()["detail"], str)


def test_a_request_is_checked_without_running_it(pool: Pool, http: httpx.Client):
    before = pool.ledger()["submitted"]
    fine = http.post("/v1/models/validate", json={"model": "quick", "messages": [{"role": "user", "content": "x"}]})
    assert fine.json() == {"valid": True, "model": "quick", "path": "/v1/chat/completions"}
    wrong = http.post("/v1/models/validate", json={"model": "quick", "prompt": "x", "temperature": 9})
    assert (wrong.status_code, wrong.json()["valid"], wrong.json()["error"]["param"]) == (200, False, "temperature")
    assert http.post("/v1/models/validate", json={"model": "nobody"}).status_code == 404
    assert http.post("/v1/models/validate", json={}).json()["error"]["code"] == "MODEL_REQUIRED"
    assert pool.ledger()["submitted"] == before


def test_how_to_place_a_model(http: httpx.Client):
    answer = http.get("/v1/models/install").json()
    assert answer["downloads"] is False
    assert answer["steps"]
    assert "llama_cpp" in answer["backends"]


def test_what_was_served_is_counted(http: httpx.Client):
    before = http.get("/admin/stats").json()
    ask(http, "quick")
    after = http.get("/admin/stats").json()
    assert after["requests_total"] == before["requests_total"] + 1
    assert after["tokens_generated_total"] == before["tokens_generated_total"] + 3
    assert after["prompt_tokens_total"] == before["prompt_tokens_total"] + 1
    assert (after["active_requests"], after["queue_depth"]) == (0, 0)
