"""`slotpool flags`: the environment of a Ray that is to run a pool."""

from __future__ import annotations

import shlex

import click

from app.cli.flags import RAY_FLAGS, direct_ingress_flags


@click.command("flags")
@click.option("--port", type=int, help="Port on which the ingress itself answers, beside Serve's proxy.")
def command(port: int | None) -> None:
    """Print the environment of a Ray that is to run a pool, in shell language: eval "$(slotpool flags)"."""
    values = RAY_FLAGS | ({} if port is None else direct_ingress_flags(port))
    for flag, value in values.items():
        click.echo(f"export {flag}={shlex.quote(value)}")
