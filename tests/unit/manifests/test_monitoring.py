"""Alerts and dashboards, as far as files can tell: their grammar, and that the pool has what they ask for. What they
find in a Prometheus is tested on a running pool, in `tests/serve/test_dashboards.py`.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from cluster.ledger.ledger import Ledger
from cluster.ledger.specs import PoolSpec
from cluster.ledger.states import ReplicaState
from cluster.metrics import CLASSES, Counts
from cluster.prometheus import families
from tests.unit.manifests.files import MANIFESTS, documents
from tests.unit.manifests.queries import ALERTS, alerts, dashboards, panel_queries, panels, without_bounds

QUERIES = {rule["alert"]: rule["expr"] for rule in alerts()} | panel_queries()
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}


@pytest.fixture(scope="module")
def metrics() -> set[str]:
    """The names of all samples that a pool can have."""
    empty = families(Counts(lambda _: True), Ledger(PoolSpec(models={}), epoch="e", now=0.0).snapshot())
    return {each.name + suffix for each in empty for suffix in SUFFIXES[each.type]}


@pytest.mark.parametrize("name", QUERIES)
def test_a_query_asks_for_what_the_pool_counts(name: str, metrics: set[str]):
    asked = set(re.findall(r"\bslotpool_\w+", QUERIES[name]))
    assert asked <= metrics
    assert asked or QUERIES[name].startswith("up{")
    states = re.findall(r'state="(\w+)"', QUERIES[name])
    assert set(states) <= {state.name.lower() for state in ReplicaState}
    assert set(re.findall(r'class="(\w+)"', QUERIES[name])) <= set(CLASSES.values())


def test_nothing_that_is_counted_is_shown_nowhere(metrics: set[str]):
    shown = {name for query in QUERIES.values() for name in re.findall(r"\bslotpool_\w+", query)}
    unseen = {name for name in metrics - shown if not name.endswith(("_sum", "_count"))}
    assert unseen == set()


@pytest.mark.parametrize(
    ("rule", "looks_at"),
    [
        ('up{job="slotpool"} == 0', 'up{job="slotpool"}'),
        (
            'sum(rate(a{status=~"5.."}[5m])) / sum(rate(a[5m])) > 0.05',
            'sum(rate(a{status=~"5.."}[5m])) / sum(rate(a[5m]))',
        ),
        ("increase(a[15m]) > 0 or (a unless a offset 15m) > 0", "increase(a[15m]) or (a unless a offset 15m)"),
    ],
)
def test_what_a_rule_looks_at_is_the_rule_without_its_bound(rule: str, looks_at: str):
    assert without_bounds(rule) == looks_at


def promtool(*arguments: str | Path) -> None:
    """Prometheus' own judgement, where it is installed."""
    if shutil.which("promtool") is None:
        print("prometheus is not installed: its tool has not seen the file")
        return
    run = subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stdout + run.stderr


def test_prometheus_takes_its_configuration():
    promtool("check", "config", "--syntax-only", MANIFESTS / "prometheus/prometheus.yml")
    (document,) = documents("prometheus/prometheus.yml")
    assert document["rule_files"] == [Path(ALERTS).name]
    (job,) = document["scrape_configs"]
    assert f'job="{job["job_name"]}"' in QUERIES["SlotpoolDown"]
    compose = yaml.safe_load((MANIFESTS / "compose.yaml").read_text())
    (secret,) = compose["services"]["prometheus"]["secrets"]
    assert job["authorization"]["credentials_file"] == secret["target"]
    ((alias, port),) = [each.split(":") for group in job["static_configs"] for each in group["targets"]]
    assert alias in compose["x-pool"]["networks"]["default"]["aliases"]
    assert compose["x-pool"]["ports"] == [f"127.0.0.1:{port}:{port}"]


def test_alerts_fire_when_they_should_and_only_then():
    promtool("check", "rules", MANIFESTS / ALERTS)
    promtool("test", "rules", Path(__file__).with_name("alerts_test.yml"))


def test_every_alert_says_how_bad_it_is_and_is_tested():
    tests = Path(__file__).with_name("alerts_test.yml").read_text()
    for rule in alerts():
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert f"alertname: {rule['alert']}\n" in tests


def lost(given: Any, read: Any, path: str = "") -> list[str]:
    """What of a document is not there any more after it was read and written."""
    if isinstance(given, dict) and isinstance(read, dict):
        return [each for key, value in given.items() for each in lost(value, read.get(key), f"{path}.{key}")]
    if isinstance(given, list) and isinstance(read, list) and len(given) == len(read):
        return [each for i, (a, b) in enumerate(zip(given, read, strict=True)) for each in lost(a, b, f"{path}[{i}]")]
    return [] if given == read else [path]


@pytest.mark.parametrize("name", dashboards())
def test_grafana_knows_every_member_of_a_dashboard(name: str):
    # Grafana publishes its schema as models that read and write a dashboard; what they do not know is lost on the way.
    register_default_plugins()
    dashboard = dashboards()[name]

    def read(document: dict[str, Any]) -> Any:
        return json.loads(JSONEncoder().encode(Dashboard.from_json(document)))

    assert lost(dashboard, read(dashboard)) == []
    dashboard["panels"][0]["fieldConfig"]["unitt"] = "s"
    assert lost(dashboard, read(dashboard)) == [".panels[0].fieldConfig.unitt"]


@pytest.mark.parametrize("name", dashboards())
def test_panels_do_not_lie_upon_each_other_and_ask_the_chosen_source(name: str):
    dashboard = dashboards()[name]
    shown = dashboard["panels"]
    assert len({panel["id"] for panel in shown}) == len(shown)
    cells = [
        {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        for at in (panel["gridPos"] for panel in shown)
    ]
    assert all(not one & other for one, other in combinations(cells, 2))
    assert all(0 <= x < 24 for cell in cells for x, _ in cell)
    sources = {target["datasource"]["uid"] for panel in panels(dashboard) for target in panel["targets"]}
    (variable,) = [each for each in dashboard["templating"]["list"] if each["type"] == "datasource"]
    assert sources == {f"${{{variable['name']}}}"}


def test_grafana_finds_the_dashboards_and_prometheus():
    compose = yaml.safe_load((MANIFESTS / "compose.yaml").read_text())
    grafana = compose["services"]["grafana"]
    (provider,) = documents("grafana/provisioning/dashboards/slotpool.yaml")[0]["providers"]
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in grafana["volumes"]
    (source,) = documents("grafana/provisioning/datasources/slotpool.yaml")[0]["datasources"]
    assert source["url"] == "${PROMETHEUS_URL}"
    assert grafana["environment"]["PROMETHEUS_URL"] == "http://prometheus:9090"
    assert "prometheus" in compose["services"]
