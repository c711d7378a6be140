"""Every query of the alerts and dashboards finds something in a real Prometheus (Debian: `prometheus`) that has scraped
a pool in which everything has happened once: swaps, drains, refusals, failures.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.pool import Pool, fake, running_pool, smollm2
from tests.prometheus import is_installed, prometheus, query, until
from tests.unit.manifests.files import MANIFESTS
from tests.unit.manifests.queries import ALERTS, alerts, panel_queries, without_bounds

#: Two that take turns on the only device, one for each thing that goes wrong, and one that knows what memory it takes.
MODELS = {
    "coder": {**fake(tokens_per_s=500, tokens=5, load_s=0.05), "num_gpus": 1, "memory_mib": 64},
    "writer": {**fake(tokens_per_s=500, tokens=5, load_s=0.05), "num_gpus": 1, "memory_mib": 64},
    "broken": fake(fault="load_fails"),
    "mortal": fake(fault="dies_after", tokens=4),
    "crowded": {**fake(ttft_s=0.5, tokens=2), "target_inflight": 1, "max_queued": 1},
    "real": smollm2(num_gpus=0, target_inflight=1),
}
#: What each alert looks at, whatever it is.
RULES = {rule["alert"]: without_bounds(rule["expr"]) for rule in alerts()}


@pytest.fixture(scope="module")
def pool(port: int) -> Iterator[Pool]:
    with running_pool(port, {"models": MODELS}) as pool:
        yield pool
        pool.check()


def ask(pool: Pool, model: str) -> None:
    """One streamed request, whatever becomes of it."""
    with contextlib.suppress(openai.APIError):
        messages = [{"role": "user", "content": "a b c"}]
        for _ in pool.openai().chat.completions.create(model=model, messages=messages, stream=True, max_tokens=4):
            pass


def use(pool: Pool) -> None:
    """A round in which everything happens."""
    for model in ("coder", "writer", "broken", "mortal", "real"):
        ask(pool, model)
    with ThreadPoolExecutor(4) as crowd:
        list(crowd.map(ask, [pool] * 4, ["crowded"] * 4))


def ended(pool: Pool) -> tuple[str, int]:
    """The text of `/metrics`, and how many requests have ended by it."""
    text = httpx.get(f"{pool.url}/metrics", timeout=30).text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return text, sum(int(each.value) for each in samples if each.name == "slotpool_requests_total")


def test_every_query_finds_something(pool: Pool, tmp_path: Path):
    use(pool)
    until(lambda: ended(pool)[1] == 9)
    if not is_installed():
        text, _ = ended(pool)
        asked = {
            name for each in (*RULES.values(), *panel_queries().values()) for name in re.findall(r"slotpool_\w+", each)
        }
        known = set(re.findall(r"^# TYPE (\w+)", text, re.MULTILINE))
        print("prometheus is not installed: the queries were not asked, their metrics are there")
        assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in asked} <= known
        return
    with prometheus(pool.url.removeprefix("http://"), tmp_path, MANIFESTS / ALERTS) as api:
        until(lambda: query(api, "sum(slotpool_requests_total) == 9"))
        # A rate needs something that has changed since it was seen first.
        use(pool)
        until(lambda: query(api, "sum(slotpool_requests_total) == 18"))
        found = {name: query(api, expression) for name, expression in (RULES | panel_queries()).items()}
        assert [name for name, result in found.items() if not result] == []
        numbers = {name: [float(each["value"][1]) for each in result] for name, result in found.items()}
        assert [name for name, values in numbers.items() if all(map(math.isnan, values))] == []
        until(lambda: {"SlotpoolLoadFails", "SlotpoolEngineDied"} <= firing(api))


def firing(api: httpx.Client) -> set[str]:
    """The alerts that Prometheus has raised."""
    raised = api.get("/alerts").raise_for_status().json()["data"]["alerts"]
    return {each["labels"]["alertname"] for each in raised if each["state"] == "firing"}
