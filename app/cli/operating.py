"""What an operator's commands share: the path of a model, and progress on the terminal while the pool obeys."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import click

from app.cli.output import Failure, console, printable, show_json
from app.cli.pool import Pool

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


def path_of(model: str) -> str:
    """The admin route of a model."""
    return f"/v1/admin/models/{quote(model, safe='/')}"


def load(pool: Pool, model: str, body: Mapping[str, Any], *, as_json: bool) -> None:
    """Load a model with engine keys, show how far it is, and print what the pool answers."""
    with ordering(pool, model, f"Loading {model}", is_quiet=as_json):
        answer = pool.send("POST", f"{path_of(model)}/load", body)
    if as_json:
        show_json(answer)
    else:
        click.echo(printable(f"{answer['model']} is loaded, with {answer['loaded_replicas']} replica(s)."))


@contextlib.contextmanager
def ordering(pool: Pool, model: str, what: str, *, is_quiet: bool) -> Iterator[None]:
    """Show on the terminal how far the pool is with a model, while the caller waits for its answer."""
    shown = console(stderr=True)
    if is_quiet:
        yield
        return
    if not shown.is_terminal:
        click.echo(f"{printable(what)} …", err=True)
        yield
        return
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    text = TextColumn("{task.description}", markup=False)
    with Progress(text, BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), console=shown, transient=True) as bar:
        task = bar.add_task(printable(what), total=None)
        threading.Thread(target=_follow, args=(pool, model, bar, task), daemon=True).start()
        yield


def _follow(pool: Pool, model: str, bar: Progress, task: TaskID) -> None:
    """Move the bar as the pool tells. Where it does not tell this key, the bar only says that something happens."""
    with contextlib.suppress(Failure, RuntimeError), pool.events() as events:
        for event in events:
            if event.kind == "load" and event.data.get("model") == model:
                bar.update(task, total=1.0, completed=event.data["data"]["progress"])
