"""A group of commands of which each is imported when it is used, not when the others are."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import click
from click.shell_completion import CompletionItem


class LazyGroup(click.Group):
    """Commands by name with their short help; `NAME` is `command` in the module `NAME` of a package.

    A name that Python reserves has an underscore behind it as a module.
    """

    def __init__(self, *args: Any, commands_with_help: dict[str, str], package: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._help = commands_with_help
        self._package = package

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, in the order in which a newcomer needs them."""
        return list(self._help)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command; None if there is none of that name."""
        if cmd_name not in self._help:
            return None
        module = f"{cmd_name}_" if cmd_name == "import" else cmd_name
        command: click.Command = import_module(f"{self._package}.{module}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands in the help, for which none is imported."""
        with formatter.section("Commands"):
            formatter.write_dl(list(self._help.items()))

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete a command's name, for which none is imported."""
        names = [CompletionItem(name, help=text) for name, text in self._help.items() if name.startswith(incomplete)]
        return names or super().shell_complete(ctx, incomplete)
