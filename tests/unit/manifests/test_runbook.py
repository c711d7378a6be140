"""The runbook knows every alert and every file, and what it tells people to type is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from ray.dashboard.modules.metrics import metrics_head

from cluster import effects
from cluster.applications import GRAPH
from tests.unit.manifests.files import MANIFESTS, check_command, documents
from tests.unit.manifests.queries import alerts

TEXT = Path("docs/runbook.md").read_text()


def test_every_alert_has_its_line_and_no_other_has():
    assert re.findall(r"^\| `(Slotpool\w+)` \|", TEXT, re.MULTILINE) == [rule["alert"] for rule in alerts()]


def test_every_file_is_named_and_every_file_that_is_named_is_there():
    (table,) = re.findall(r"^\| \| \|\n\|---\|---\|\n((?:\|.*\n)+)", TEXT, re.MULTILINE)
    named = set(re.findall(r"`([\w./-]+)`(?=[,. |])", table.replace("`ray up`", "")))
    assert all((MANIFESTS / name).exists() for name in named), named
    there = {path.relative_to(MANIFESTS) for path in MANIFESTS.rglob("*") if path.is_file()}
    assert [path for path in there if not any(str(path).startswith(name) for name in named)] == []


@pytest.mark.parametrize("line", sorted(set(re.findall(r"`((?:slotpool|ray|serve) [a-z-]+(?: [^`]*)?)`", TEXT))))
def test_every_command_is_one(line: str):
    check_command(line, is_named_only=True)


def test_what_drains_a_node_is_a_command_of_ray():
    (line,) = re.findall(r"^ray drain-node .+$", TEXT, re.MULTILINE)
    check_command(line)


def test_what_it_says_of_rays_names_is_so():
    for name in (metrics_head.PROMETHEUS_HOST_ENV_VAR, metrics_head.GRAFANA_HOST_ENV_VAR):
        assert f"`{name}`" in TEXT
    assert f"--name {effects.LEDGER_NAME} --namespace {effects.NAMESPACE}`" in TEXT
    assert GRAPH == "slotpool"
    (_, _, service) = documents("kuberay/rayservice.yaml")
    delay = service["spec"]["rayClusterDeletionDelaySeconds"]
    assert f"`rayClusterDeletionDelaySeconds` ({delay})" in TEXT
