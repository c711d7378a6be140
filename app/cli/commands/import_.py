"""`slotpool import`: a configuration of another program as one of the pool's, with what is left behind."""

from __future__ import annotations

import json
import re
from pathlib import Path

import click
import yaml

from app.cli.importers import IMPORTERS
from app.cli.importers.draft import Source
from app.cli.output import Failure, json_option, printable, show_json
from cluster.config import ConfigError, load_config


@click.command("import")
@click.argument("program", type=click.Choice(list(IMPORTERS)))
@click.argument("file", type=click.Path(path_type=Path))
@json_option
def command(program: str, file: Path, as_json: bool) -> None:
    """Turn a configuration of PROGRAM into the pool's: slotpool import llama-swap config.yaml > pool.yaml

    Standard error has a line for everything that is not carried over, or means something else here.
    """
    draft = IMPORTERS[program](Source(file))
    document = draft.document()
    notes = sorted(draft.notes)
    if as_json:
        show_json({"config": document, "notes": [note._asdict() for note in notes]})
    else:
        head = f"# From {file.name} by slotpool import {program}; slotpool validate says what fits.\n"
        click.echo(head + yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=110), nl=False)
        for note in notes:
            click.echo(printable(f"{file.name}:{note.line}: {note.key}: {note.message}"), err=True)
    if not (draft.models or draft.servers):
        raise Failure(f"nothing of {file.name} could be carried over")
    # Whether a variable is set is a matter of the machine that serves.
    variables = dict.fromkeys(re.findall(r"env:(\w+)", json.dumps(document)), "set")
    try:
        load_config(document, variables)
    except ConfigError as error:
        mistakes = str(error).replace("serve_config.yaml: args: ", "")
        raise Failure(f"to be changed by hand: {mistakes}") from None
