"""`/metrics` of a real pool, scraped by the real Prometheus where it is installed (Debian: `prometheus`)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.pool import Pool, fake, running_pool
from tests.prometheus import is_installed, prometheus, query, until

MODELS = {"counted": {**fake(tokens_per_s=200, tokens=5), "target_inflight": 4}}
REQUESTS = 3


@pytest.fixture(scope="module")
def pool(port: int) -> Iterator[Pool]:
    with running_pool(port, {"models": MODELS}) as pool:
        for _ in range(REQUESTS):
            pool.openai().chat.completions.create(model="counted", messages=[{"role": "user", "content": "x"}])
        yield pool
        pool.check()


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
    if not is_installed():
        print("prometheus is not installed: its client's parser has read the text, and that is all")
        until(lambda: counted(pool) == REQUESTS)
        return
    with prometheus(pool.url.removeprefix("http://"), tmp_path) as api:

        def is_up() -> bool:
            targets = api.get("/targets").raise_for_status().json()["data"]["activeTargets"]
            assert not any(each["lastError"] for each in targets), targets
            return [each["health"] for each in targets] == ["up"]

        def value() -> bool:
            found = query(api, 'sum(slotpool_requests_total{model="counted",status="200"})')
            return [float(each["value"][1]) for each in found] == [REQUESTS]

        until(is_up)
        until(value)
