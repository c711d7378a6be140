"""`slotpool pin`: keep a model loaded, whoever waits for another."""

from __future__ import annotations

import click

from app.cli.operating import load, path_of
from app.cli.output import json_option, show_json
from app.cli.pool import Pool, complete_model, pool_options


@click.command("pin")
@click.argument("model", shell_complete=complete_model)
@click.option("--off", is_flag=True, help="Let it make room for others again.")
@json_option
@pool_options
def command(pool: Pool, model: str, off: bool, as_json: bool) -> None:
    """Load a model and keep it loaded: it makes room for nobody, and does not idle out. Lasts as long as the pool."""
    pool.send("PATCH", path_of(model), {"pinned": not off})
    if not off:
        load(pool, model, {}, as_json=as_json)
    elif as_json:
        show_json({"status": "unpinned", "model": model})
    if not as_json:
        click.echo(f"{model} is {'no longer ' if off else ''}pinned.")
