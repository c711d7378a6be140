"""`slotpool models`: every model that the pool knows."""

from __future__ import annotations

import click

from app.cli.output import Column, json_option, listed, show
from app.cli.pool import Pool, pool_options

COLUMNS = (
    Column("MODEL", "id"),
    Column("STATUS", "status"),
    Column("BACKEND", "backend"),
    Column("RUNS ON", "execution_mode"),
    Column("SLOTS", "slots", is_number=True),
    Column("CONTEXT", "context_length", is_number=True),
    Column("ALIASES", "aliases", listed),
    Column("CAN", "capabilities", listed),
)


@click.command("models")
@json_option
@pool_options
def command(pool: Pool, as_json: bool) -> None:
    """List the models that the pool knows."""
    show(COLUMNS, pool.get("/v1/models")["data"], as_json=as_json, nothing="The pool has no models.")
