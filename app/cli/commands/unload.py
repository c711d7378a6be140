"""`slotpool unload`: end a model once its requests have ended."""

from __future__ import annotations

import click

from app.cli.operating import ordering, path_of
from app.cli.output import json_option, show_json
from app.cli.pool import Pool, complete_model, pool_options


@click.command("unload")
@click.argument("model", shell_complete=complete_model)
@json_option
@pool_options
def command(pool: Pool, model: str, as_json: bool) -> None:
    """Unload a model: who waits for it is refused, what runs may end."""
    with ordering(pool, model, f"Unloading {model}", is_quiet=as_json):
        answer = pool.send("POST", f"{path_of(model)}/unload")
    if as_json:
        show_json(answer)
    else:
        click.echo(f"{answer['model']} is unloaded.")
