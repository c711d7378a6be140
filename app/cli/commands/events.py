"""`slotpool events`: what happens in the pool, a sentence for each change."""

from __future__ import annotations

import json
import time
from typing import Any

import click

from app.cli.output import json_option, printable
from app.cli.pool import Event, Pool, complete_model, pool_options
from cluster import sentences


@click.command("events")
@click.option("--model", shell_complete=complete_model, help="Only what concerns this model.")
@click.option("--last", type=click.IntRange(min=0), default=0, help="Begin with so many changes that were before.")
@click.option("--follow/--no-follow", default=True, help="Go on until Ctrl-C, or end with what was before.")
@json_option
@pool_options
def command(pool: Pool, model: str | None, last: int, follow: bool, as_json: bool) -> None:
    """Follow what happens in the pool, until Ctrl-C. With --json, a line of JSON for each change."""
    if last or not follow:
        known = [each for each in pool.history() if concerns(each, model)]
        for change in known[-last:] if last else known:
            say(change, as_json)
    if not follow:
        return
    for event in pool.follow():
        if is_change(event):
            if concerns(event.data, model):
                say(event.data, as_json)
        elif event.kind == "reset":
            click.echo("The scheduler was restarted.", err=True)


def is_change(event: Event) -> bool:
    """Whether an event is an entry of the change log, and no snapshot."""
    return isinstance(event.data, dict) and "version" in event.data


def concerns(change: dict[str, Any], model: str | None) -> bool:
    """Whether a change is about this model; None stands for all of them."""
    return model is None or change.get("model") == model


def say(change: dict[str, Any], as_json: bool) -> None:
    """Print one change."""
    click.echo(json.dumps(change) if as_json else line(change))


def line(change: dict[str, Any]) -> str:
    """One change for people: the time of day here, and a sentence."""
    at = time.strftime("%H:%M:%S", time.localtime(change.get("time") or 0))
    return f"{at}  {printable(sentences.of_change(change))}"
