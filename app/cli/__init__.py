"""The command line: `slotpool serve` runs a pool on this machine, the other commands prepare one or talk to one.

Each command is a file of its own under `commands/`, which is imported when it is used: `slotpool --help` needs none of
them, and no command but `serve` needs Ray.
"""

from __future__ import annotations

import os
import sys

import click

from app.cli.group import LazyGroup
from app.cli.output import Failure

__all__ = ["cli", "main"]

#: What Ctrl-C gives a command's caller, by custom of the shells.
INTERRUPTED = 130

COMMANDS = {
    "serve": "Run a pool on this machine.",
    "flags": "Print what to export before Ray is started by other means.",
    "add": "Write the configuration of a model's file.",
    "validate": "Check a configuration, and show what fits.",
    "doctor": "Say which engines and devices are there, and what is missing.",
    "import": "Turn a configuration of llama-swap, LiteLLM or Ollama into one.",
    "status": "Show what the pool is doing.",
    "models": "List the models that the pool knows.",
    "ps": "List the replicas and what they run.",
    "load": "Load a model now.",
    "unload": "Unload a model once its requests have ended.",
    "pin": "Keep a model loaded, whoever waits for another.",
    "chat": "Talk to a model.",
    "events": "Follow what happens in the pool.",
    "why": "Explain what the pool did for a request or a model.",
    "bench": "Measure how fast a server answers.",
    "completion": "Print the script that completes commands in a shell.",
}


@click.command(
    cls=LazyGroup,
    commands_with_help=COMMANDS,
    package="app.cli.commands",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(package_name="slotpool", message="slotpool %(version)s")
def cli() -> None:
    """Many local LLMs, few GPUs, one OpenAI-compatible endpoint.

    Commands that talk to a running pool find it at --url, or SLOTPOOL_URL, or http://127.0.0.1:8000, and show it the
    key that is in SLOTPOOL_API_KEY or in the file that --key-file names.
    """


def main(argv: list[str] | None = None) -> None:
    """Entry point of the `slotpool` command. What goes wrong is one line each, never a traceback."""
    try:
        code = cli.main(argv, prog_name="slotpool", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        code = error.exit_code
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else "slotpool"
        click.echo(f"slotpool: {error.format_message()} (see {path} --help)", err=True)
        code = error.exit_code
    except click.ClickException as error:
        click.echo(f"slotpool: {error.format_message()}", err=True)
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        code = INTERRUPTED
    except BrokenPipeError:
        # Who read our output has enough of it; Python must not complain about that again when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = Failure.exit_code
    except Exception as error:
        # Only now, since what checks configurations takes a while to import.
        from cluster.config import ConfigError

        if not isinstance(error, ConfigError):
            raise
        click.echo(f"slotpool: {error}", err=True)
        code = Failure.exit_code
    if code:
        sys.exit(code)
