"""The queries of the alerts and of the dashboards, taken from the files themselves."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from tests.unit.manifests.files import MANIFESTS, documents

ALERTS = "prometheus/alerts.yml"
#: What Grafana puts in the place of its variables.
VARIABLES = {"$__rate_interval": "1m", "$__range": "1h", "$model": ".*"}


def alerts() -> list[dict[str, Any]]:
    """The rules."""
    (document,) = documents(ALERTS)
    return [rule for group in document["groups"] for rule in group["rules"]]


def without_bounds(expression: str) -> str:
    """What an alert looks at, whatever it is: the rule without the bounds beyond which it fires."""
    return re.sub(r"\s(==|>)\s*[\d.]+", "", expression)


def dashboards() -> dict[str, dict[str, Any]]:
    """Each dashboard by its file's name."""
    files = sorted((MANIFESTS / "grafana/dashboards").glob("*.json"))
    return {file.name: json.loads(file.read_text()) for file in files}


def panels(dashboard: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The panels that show something, those in closed rows included."""
    for panel in dashboard["panels"]:
        if panel["type"] != "row":
            yield panel
        yield from panel.get("panels", ())


def panel_queries() -> dict[str, str]:
    """Each query of each panel as Prometheus gets it, by the panel's title and the query's letter."""
    found = {}
    for dashboard in dashboards().values():
        for panel in panels(dashboard):
            for target in panel["targets"]:
                expression = target["expr"]
                for name, value in VARIABLES.items():
                    expression = expression.replace(name, value)
                assert "$" not in expression, expression
                name = f"{dashboard['title']}: {panel['title']}: {target['refId']}"
                assert name not in found, name
                found[name] = expression
    return found
