"""One model on four logical GPUs, asked by the allocator's clients; run by `test_devices.py`."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import httpx

from tests.pool import fake, local_serve, running_pool

MODEL = {**fake(tokens=60, tokens_per_s=10), "num_gpus": 1, "max_replicas": 4, "target_inflight": 1}


def test_four_requests_run_on_four_devices():
    # Four processes that are started through Serve may take longer on a busy machine than this family waits by itself.
    config = {"models": {"m": MODEL}, "request_timeout_seconds": 120}
    with local_serve(gpus=4) as port, running_pool(port, config) as pool:
        with httpx.Client(base_url=pool.url, timeout=120) as http, ThreadPoolExecutor(4) as threads:

            def ask(_: int) -> dict:
                answer = http.post("/api/v1/inference", json={"model_id": "m", "prompt": "x"})
                assert answer.status_code == 200, answer.text
                return answer.json()

            answers = threads.map(ask, range(4))
            pool.wait(lambda ledger: ledger["leases"] == 4, timeout_s=90)
            assert http.get("/api/v1/status").json() == {"queue_size": 0, "gpus_available": 0, "gpus_busy": 4}
            assert sorted(answer["gpu_id"] for answer in answers) == [0, 1, 2, 3]
        pool.check()
