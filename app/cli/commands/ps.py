"""`slotpool ps`: every replica, with where it is and what it runs."""

from __future__ import annotations

from typing import Any

import click

from app.cli.output import Column, json_option, listed, seconds, show
from app.cli.pool import Pool, pool_options

COLUMNS = (
    Column("MODEL", "model"),
    Column("REPLICA", "replica"),
    Column("STATE", "state"),
    Column("RUNNING", "running"),
    Column("NODE", "node", lambda node: str(node)[:12]),
    Column("DEVICES", "devices", listed),
    Column("PID", "pid", is_number=True),
    Column("FOR", "state_s", seconds, is_number=True),
    Column("LOADED", "progress", lambda done: f"{done:.0%}", is_number=True),
)


@click.command("ps")
@json_option
@pool_options
def command(pool: Pool, as_json: bool) -> None:
    """List the replicas and what they run."""
    ledger = pool.get("/v1/status")["ledger"]
    rows = [row(each, ledger["now"]) for each in ledger["replicas"]]
    show(COLUMNS, rows, as_json=as_json, nothing="No replica runs: the next request starts one.")


def row(replica: dict[str, Any], now: float) -> dict[str, Any]:
    """A replica of the snapshot, with how long it has been in its state and what it runs of its slots."""
    shown = {
        "running": f"{replica['leases']}/{replica['slots']}",
        "state_s": round(max(0.0, now - replica["since"]), 3),
    }
    return {**replica, **shown}
