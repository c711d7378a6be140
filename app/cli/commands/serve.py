"""`slotpool serve`: a pool on this machine, until Ctrl-C.

It is `serve run serve_config.yaml` with four things around it: a Ray of its own with the logical GPUs asked for, port
and pool configuration laid over the file, progress on the terminal, and an end that leaves nothing behind.
"""

from __future__ import annotations

from pathlib import Path

import click

from app.cli.checks import refuse_full_disk, refuse_strangers_without_keys, refuse_taken_port
from app.cli.document import declared_gpus, document_of, lay_over
from app.cli.serve import serve_here
from app.cli.supervisor import continue_in_own_session
from cluster.config import load_config


@click.command("serve")
@click.argument("source", type=click.Path(path_type=Path), required=False, metavar="[FILE|FOLDER]")
@click.option("--config", type=click.Path(path_type=Path), help="A pool configuration that replaces the file's args.")
@click.option("--port", type=int, help="HTTP port on the configured host.")
@click.option("--gpus", type=int, help="Logical GPUs that the local Ray declares (default: what is there).")
def command(source: Path | None, config: Path | None, port: int | None, gpus: int | None) -> None:
    """Run a pool on this machine until Ctrl-C.

    FILE is a configuration of the pool or of Serve, or a GGUF file; where none is given, serve_config.yaml of the
    working folder. Of a FOLDER all GGUF files are served. Without either, it is a small built-in chat model.
    """
    gpus = declared_gpus() if gpus is None else gpus
    document = lay_over(document_of(source, gpus, config), config, port)
    pool = load_config(document["applications"][0].get("args"))
    http = document["http_options"]
    refuse_strangers_without_keys(http["host"], pool)
    refuse_taken_port(http["host"], http["port"])
    refuse_full_disk()
    continue_in_own_session()
    serve_here(document, pool, gpus)
