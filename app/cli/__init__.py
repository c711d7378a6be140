"""The command line: `slotpool serve` runs a pool on this machine and says what to type next.

It is `serve run serve_config.yaml` with four things around it: a Ray of its own with the logical GPUs asked for, port
and pool configuration laid over the file, progress on the terminal, and an end that leaves nothing behind.
`slotpool flags` prints what to export before Ray is started by other means.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from app.cli.checks import refuse_full_disk, refuse_strangers_without_keys, refuse_taken_port
from app.cli.document import declared_gpus, lay_over
from app.cli.flags import OWN_RAY_FLAGS, RAY_FLAGS, direct_ingress_flags
from app.cli.serve import serve_here
from app.cli.supervisor import continue_in_own_session
from cluster.config import ConfigError, load_config, read_yaml

__all__ = [
    "OWN_RAY_FLAGS",
    "RAY_FLAGS",
    "declared_gpus",
    "direct_ingress_flags",
    "lay_over",
    "main",
    "refuse_strangers_without_keys",
]

DEFAULT_FILE = Path("serve_config.yaml")


def main(argv: list[str] | None = None) -> None:
    """Entry point of the `slotpool` command."""
    parser = argparse.ArgumentParser(prog="slotpool", description="Many local LLMs, few GPUs, one endpoint.")
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve", help="run a pool on this machine")
    serve.add_argument("file", nargs="?", type=Path, default=DEFAULT_FILE, help="the Serve configuration")
    serve.add_argument("--config", type=Path, help="a pool configuration that replaces the file's args")
    serve.add_argument("--port", type=int, help="HTTP port on the configured host")
    serve.add_argument("--gpus", type=int, help="logical GPUs that the local Ray declares (default: what is there)")
    flags = commands.add_parser("flags", help="print the environment of a Ray that is to run a pool, for `eval`")
    flags.add_argument("--port", type=int, help="port on which the ingress itself answers, beside Serve's proxy")
    options = parser.parse_args(argv)
    try:
        if options.command == "flags":
            print_flags(options.port)
        else:
            run(options.file, options.config, options.port, declared_gpus() if options.gpus is None else options.gpus)
    except ConfigError as error:
        sys.exit(f"slotpool: {error}")


def print_flags(port: int | None) -> None:
    """Say in shell language what to export before Ray starts."""
    values = RAY_FLAGS | ({} if port is None else direct_ingress_flags(port))
    for flag, value in values.items():
        print(f"export {flag}={shlex.quote(value)}")


def run(file: Path, config: Path | None, port: int | None, gpus: int | None) -> None:
    """Check everything that can be checked before a process is started, then serve until interrupted."""
    document = lay_over(read_yaml(file), config, port)
    pool = load_config(document["applications"][0].get("args"))
    http = document["http_options"]
    refuse_strangers_without_keys(http["host"], pool)
    refuse_taken_port(http["host"], http["port"])
    refuse_full_disk()
    continue_in_own_session()
    serve_here(document, pool, gpus)
