"""`slotpool why`: what the pool did for a request or a model, and what it was decided by."""

from __future__ import annotations

from typing import Any

import click

from app.cli.commands.events import line
from app.cli.output import Failure, json_option, printable, show_json
from app.cli.pool import Pool, complete_model, pool_options
from cluster import sentences

#: What tells nothing of reasons.
DULL = ("lease", "load", "queue", "request")


@click.command("why")
@click.argument("name", metavar="REQUEST|MODEL", shell_complete=complete_model)
@click.option("--last", type=click.IntRange(min=1), default=12, show_default=True, help="At most so many changes.")
@json_option
@pool_options
def command(pool: Pool, name: str, last: int, as_json: bool) -> None:
    """Explain how a model came to stand as it does, or what was done for a request.

    A request is called by the X-Request-Id of its answer. The pool remembers its last 10,000 changes.
    """
    ledger = pool.get("/v1/status")["ledger"]
    row = ledger["models"].get(name)
    changes = pool.history()
    found = of_model(name, changes) if row is not None else of_request(name, changes)
    if as_json:
        show_json({"model": row, "changes": found[-last:]})
        return
    if row is not None:
        click.echo(printable(sentences.of_model(name, row, ledger["now"])))
    elif not found:
        raise Failure(
            f"no model is called {name!r}, and nothing was loaded or moved for a request of that id: "
            "it found its model loaded, waits in line, or is too long ago"
        )
    for change in found[-last:]:
        click.echo(line(change))


def of_model(model: str, changes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What led to a model's present state: what happened to its replicas, and why it failed."""
    return [each for each in changes if each.get("model") == model and each["kind"] not in DULL and not is_echo(each)]


def is_echo(change: dict[str, Any]) -> bool:
    """Whether a change only says of the model what was said of a replica."""
    return change["kind"] == "model" and not (
        (change.get("data") or {}).get("last_error") or change["data"].get("removed")
    )


def of_request(request: str, changes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was decided for the sake of a request."""
    return [each for each in changes if request in waiters(each)]


def waiters(change: dict[str, Any]) -> tuple[Any, ...]:
    """The request that a change is about, by its client's id and by the ledger's: one that ended, or that waited."""
    data = change.get("data") or {}
    because = data.get("because") or {}
    ended = (data.get("trace"), data.get("id")) if change.get("kind") == "request" else ()
    return because.get("request"), because.get("waiter"), *ended
