"""`slotpool completion`: the script that makes a shell complete commands, options and the names of models."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

WHERE = {
    "bash": 'eval "$(slotpool completion bash)" in ~/.bashrc',
    "zsh": 'eval "$(slotpool completion zsh)" in ~/.zshrc',
    "fish": "slotpool completion fish > ~/.config/fish/completions/slotpool.fish",
}


@click.command("completion")
@click.argument("shell", type=click.Choice(list(WHERE)))
@click.pass_context
def command(ctx: click.Context, shell: str) -> None:
    """Print the script that completes commands, options and models in SHELL.

    \b
    bash:  eval "$(slotpool completion bash)" in ~/.bashrc
    zsh:   eval "$(slotpool completion zsh)" in ~/.zshrc
    fish:  slotpool completion fish > ~/.config/fish/completions/slotpool.fish
    """
    completion = get_completion_class(shell)
    assert completion is not None, "click knows these shells"
    click.echo(completion(ctx.find_root().command, {}, "slotpool", "_SLOTPOOL_COMPLETE").source())
