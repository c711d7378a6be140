"""`/metrics` of a real pool, scraped by the real Prometheus where it is installed (Debian: `prometheus`)."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.pool import Pool, fake, free_port, running_pool

MODELS = {"counted": {**fake(tokens_per_s=200, tokens=5), "target_inflight": 4}}
REQUESTS = 3


@pytest.fixture(scope="module")
def pool(port: int) -> Iterator[Pool]:
    with running_pool(port, {"models": MODELS}) as pool:
        for _ in range(REQUESTS):
            pool.openai().chat.completions.create(model="counted", messages=[{"role": "user", "content": "x"}])
        yield pool
        pool.check()


@contextlib.contextmanager
def prometheus(target: str, folder: Path) -> Iterator[httpx.Client]:
    """A Prometheus that scrapes one target every second, and a client of its API."""
    port = free_port()
    config = folder / "prometheus.yml"
    config.write_text(
        "global: {scrape_interval: 1s}\n"
        f"scrape_configs: [{{job_name: slotpool, static_configs: [{{targets: ['{target}']}}]}}]\n"
    )
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={config}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=log,
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}/api/v1", timeout=30) as client:
            yield client
    finally:
        process.terminate()
        process.wait(30)


def until(look: Callable[[], Any], timeout_s: float = 60.0) -> Any:
    """What `look` finds once that is something; an API that is not up yet has nothing."""
    deadline = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(httpx.HTTPError):
            if found := look():
                return found
        assert time.monotonic() < deadline, "Prometheus has not seen it in time"
        time.sleep(0.1)


def counted(pool: Pool) -> float:
    """The requests of our model that went well, by the pool's own text."""
    text = httpx.get(f"{pool.url}/metrics", timeout=30).text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    samples = families["slotpool_requests"].samples
    return sum(each.value for each in samples if (each.labels["model"], each.labels["status"]) == ("counted", "200"))


def test_the_text_is_what_prometheus_expects(pool: Pool):
    # Its count travels behind the answer.
    until(lambda: counted(pool) == REQUESTS)
    answer = httpx.get(f"{pool.url}/metrics", timeout=30)
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = {family.name: family for family in text_string_to_metric_families(answer.text)}
    (sample,) = [each for each in families["slotpool_requests"].samples if each.labels["model"] == "counted"]
    labels = {"model": "counted", "family": "chat", "status": "200", "class": "medium", "principal": "anonymous"}
    assert sample.labels == labels
    by_name = {each.name: each.value for family in families.values() for each in family.samples}
    assert by_name["slotpool_tokens_out_total"] == 5 * REQUESTS
    assert by_name["slotpool_ttft_seconds_count"] == by_name["slotpool_request_seconds_count"] == REQUESTS
    assert by_name["slotpool_load_seconds"] > 0


def test_prometheus_scrapes_the_pool(pool: Pool, tmp_path: Path):
    if shutil.which("prometheus") is None:
        print("prometheus is not installed: its client's parser has read the text, and that is all")
        until(lambda: counted(pool) == REQUESTS)
        return
    with prometheus(pool.url.removeprefix("http://"), tmp_path) as api:

        def is_up() -> bool:
            targets = api.get("/targets").raise_for_status().json()["data"]["activeTargets"]
            assert not any(each["lastError"] for each in targets), targets
            return [each["health"] for each in targets] == ["up"]

        def value() -> bool:
            query = {"query": 'sum(slotpool_requests_total{model="counted",status="200"})'}
            found = api.get("/query", params=query).raise_for_status().json()["data"]["result"]
            return [float(each["value"][1]) for each in found] == [REQUESTS]

        until(is_up)
        until(value)
