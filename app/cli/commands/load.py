"""`slotpool load`: load a model now, and show how far it is."""

from __future__ import annotations

import click
import yaml

from app.cli.operating import load
from app.cli.output import json_option
from app.cli.pool import Pool, complete_model, pool_options


@click.command("load")
@click.argument("model", shell_complete=complete_model)
@click.option("--replicas", type=click.IntRange(min=1), help="So many replicas, all or none.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="An engine key for this load only.")
@json_option
@pool_options
def command(pool: Pool, model: str, replicas: int | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Load a model now, and wait until it serves."""
    body = {**dict(map(_pair, overrides)), **({"replicas": replicas} if replicas else {})}
    load(pool, model, body, as_json=as_json)


def _pair(text: str) -> tuple[str, object]:
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise click.UsageError(f"--set wants KEY=VALUE, and not {text!r}")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError:
        return key, value
