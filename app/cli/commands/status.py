"""`slotpool status`: what the pool is doing, once or all the time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from app.cli.output import Column, console, emit, json_option, mib, printable, seconds, show_json, table
from app.cli.pool import Pool, Refused, pool_options
from cluster import sentences

if TYPE_CHECKING:
    from rich.console import RenderableType

#: Pause between two looks: after one that was for an event, and where the pool tells this key of no events.
PAUSE_S, LOOK_S = 0.2, 1.0
MODELS = (
    Column("MODEL", "model"),
    Column("STATE", "state"),
    Column("REPLICAS", "ready", is_number=True),
    Column("RUNNING", "running", is_number=True),
    Column("QUEUED", "queued", is_number=True),
    Column("MEMORY", "memory", mib, is_number=True),
    Column("LOAD", "load_s", seconds, is_number=True),
    Column("", "note"),
)
SERVERS = (
    Column("SERVER", "url"),
    Column("STATE", "state"),
    Column("RUNNING", "running", is_number=True),
    Column("MODEL", "current_model"),
    Column("", "last_refresh_error"),
)


@click.command("status")
@click.option("--watch", is_flag=True, help="Go on until Ctrl-C.")
@json_option
@pool_options
def command(pool: Pool, watch: bool, as_json: bool) -> None:
    """Show what the pool is doing."""
    if not watch:
        status = pool.get("/v1/status")
        if as_json:
            show_json(status)
        else:
            emit(*rendered(pool.url, status))
        return
    shown = console()
    if as_json or not shown.is_terminal:
        for status in statuses(pool):
            if as_json:
                show_json(status)
            else:
                emit(*rendered(pool.url, status), "")
        return
    from rich.console import Group
    from rich.live import Live

    with Live(console=shown, auto_refresh=False) as live:
        for status in statuses(pool):
            live.update(Group(*rendered(pool.url, status)), refresh=True)


def statuses(pool: Pool) -> Iterator[dict[str, Any]]:
    """The pool's status whenever something has happened. Endless, as long as the pool answers.

    Events say that there is something to see, and the status shows it as a whole; who may not follow them looks every
    second.
    """
    try:
        seen_at = 0.0
        for event in pool.follow():
            # What came while we waited is in the status already that was read.
            if event.kind == "snapshot" or (event.data or {}).get("time", seen_at) >= seen_at:
                time.sleep(PAUSE_S)
                status = pool.get("/v1/status")
                seen_at = status["ledger"]["time"]
                yield status
    except Refused as refusal:
        if not refusal.wants_key:
            raise
    while True:
        yield pool.get("/v1/status")
        time.sleep(LOOK_S)


def rendered(url: str, status: dict[str, Any]) -> list[RenderableType]:
    """The whole status for people."""
    from rich.text import Text

    ledger = status["ledger"]
    head = (
        f"{url}: {status['execution_mode']} mode, {sentences.counted(ledger['leases'], 'request')} running, "
        f"{ledger['queued']} queued, {ledger['finished']} finished, {ledger['rejected']} refused"
    )
    parts: list[RenderableType] = [Text(printable(head))]
    for note in notes(ledger):
        parts.append(Text(printable(note), style="bold"))
    if ledger["models"]:
        parts.append(table(MODELS, [model_row(name, ledger) for name in ledger["models"]]))
    if ledger["servers"]:
        parts.append(table(SERVERS, [server_row(each) for each in ledger["servers"]]))
    return parts


def notes(ledger: dict[str, Any]) -> Iterator[str]:
    """What an operator should know at once."""
    if ledger["recovering"]:
        yield "The scheduler was restarted and learns what runs."
    if ledger["stalled"]:
        yield f"Nothing moves any more: {ledger['stalled']}"
    if ledger["overloaded"]:
        yield "Overloaded: somebody waits longer than the bound of his class."


def model_row(name: str, ledger: dict[str, Any]) -> dict[str, Any]:
    """One model for people; memory is what was measured, or else what is expected."""
    row = ledger["models"][name]
    serving = [each for each in ledger["replicas"] if each["model"] == name and each["state"] in ("READY", "DRAINING")]
    progress = max((each["progress"] for each in ledger["replicas"] if _loads(each, name)), default=None)
    state = "sleeping" if row["state"] == "unloaded" and row["asleep"] else row["state"]
    return {
        "model": name,
        "state": state if progress is None else f"{state} {progress:.0%}",
        "ready": row["ready"],
        "running": f"{row['leases']}/{sum(each['slots'] for each in serving)}",
        "queued": row["queued"],
        "memory": row["memory_mib"] or row["memory_estimated_mib"],
        "load_s": row["load_s"],
        "note": sentences.first_line(row["last_error"]) if row["last_error"] else "pinned" if row["pinned"] else None,
    }


def server_row(server: dict[str, Any]) -> dict[str, Any]:
    """One external server for people."""
    state = "up" if server["is_up"] else "down"
    return {**server, "state": state, "running": f"{server['active_requests']}/{server['max_concurrent']}"}


def _loads(replica: dict[str, Any], model: str) -> bool:
    return replica["model"] == model and replica["state"] == "LOADING" and replica.get("progress") is not None
