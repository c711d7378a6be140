"""What commands print: tables for people, JSON for programs, and a failure in one line.

Text that comes from a pool, its models or its files is shown without control characters, since those could tell the
terminal to do things.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import click

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

F = TypeVar("F", bound=Callable[..., Any])

#: Of a table that no terminal bounds: a line for each row, however long.
UNBOUNDED = 10_000
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Failure(click.ClickException):
    """A command could not do its work. The message is one line that says what to do about it."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class Misuse(Failure):
    """The command line makes no sense; the same status as for an unknown option."""

    exit_code = 2


class Unreachable(Failure):
    """Nobody answers."""

    exit_code = 3


class Column(NamedTuple):
    """One column: its title, the key of its value in a row, how that is written, and whether it is a number."""

    title: str
    key: str
    write: Callable[[Any], str] = str
    is_number: bool = False


def json_option(command: F) -> F:
    """Adds `--json`, as `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")(command)


def console(*, stderr: bool = False) -> Console:
    """A terminal, or a pipe, which gets neither colours nor lines cut at some width. `NO_COLOR` is honoured."""
    from rich.console import Console

    made = Console(stderr=stderr, markup=False, highlight=False, emoji=False, soft_wrap=False)
    return (
        made
        if made.is_terminal
        else Console(stderr=stderr, markup=False, highlight=False, emoji=False, width=UNBOUNDED, no_color=True)
    )


def table(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]]) -> Table:
    """Rows as a table without lines. What a row does not have is left empty."""
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        made.add_column(column.title, justify="right" if column.is_number else "left", overflow="fold")
    for row in rows:
        values = ((column, row.get(column.key)) for column in columns)
        made.add_row(*(Text("" if value is None else printable(column.write(value))) for column, value in values))
    return made


def show(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]], *, as_json: bool, nothing: str) -> None:
    """Print rows: as JSON with everything that they hold, or as a table, or what to say when there are none."""
    if as_json:
        show_json(rows)
    elif rows:
        emit(table(columns, rows))
    else:
        click.echo(nothing)


def emit(*parts: RenderableType) -> None:
    """Print what rich can show; in a pipe without the spaces that fill a table's last column."""
    shown = console()
    if shown.is_terminal:
        shown.print(*parts, sep="\n")
        return
    with shown.capture() as captured:
        shown.print(*parts, sep="\n")
    for line in captured.get().splitlines():
        click.echo(line.rstrip())


def show_json(value: Any) -> None:
    """Print a value as JSON."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def printable(text: str) -> str:
    """A text without what could steer a terminal; line ends and tabs stay."""
    return _CONTROLS.sub("", text)


def seconds(value: float) -> str:
    """A duration for people: `0.35 s`, `12 s`, `3 min`, `5 h`."""
    if value < 10:
        return f"{value:.2f} s"
    if value < 120:
        return f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.0f} h"


def mib(value: float) -> str:
    """An amount of memory for people, from MiB."""
    return f"{value:.0f} MiB" if value < 1024 else f"{value / 1024:.1f} GiB"


def listed(values: Sequence[Any]) -> str:
    """Several values in one cell."""
    return ", ".join(map(str, values))
