"""`slotpool chat`: a conversation with a model in the terminal, or one question in a pipe."""

from __future__ import annotations

import sys
from typing import Any

import click

from app.cli.conversation import Conversation, Sampling
from app.cli.output import Failure, Misuse, console
from app.cli.pool import Pool, complete_model, pool_options


@click.command("chat")
@click.argument("model", required=False, shell_complete=complete_model)
@click.option("--message", "-m", help="Ask this, print the answer and end.")
@click.option("--system", help="What the model is told about its part.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="The longest answer, in tokens.")
@click.option("--temperature", type=click.FloatRange(min=0), help="0 always gives the likeliest answer.")
@pool_options
def command(
    pool: Pool,
    model: str | None,
    message: str | None,
    system: str | None,
    max_tokens: int | None,
    temperature: float | None,
) -> None:
    """Talk to MODEL, or to the pool's only one. Ctrl-C stops an answer, Ctrl-D ends the conversation.

    Where standard input is no terminal, all of it is one question.
    """
    talk = Conversation(pool, model or only_model(pool), system, Sampling(max_tokens, temperature))
    if message is None and not sys.stdin.isatty():
        message = sys.stdin.read()
    if message is not None:
        if not message.strip():
            raise Misuse("there is no question to ask")
        talk.ask(message)
        return
    # With it, `input` can be edited, and remembers.
    import readline  # noqa: F401

    shown = console(stderr=True)
    shown.print(f"{talk.model} at {pool.url}. Ctrl-C stops an answer, Ctrl-D ends.", style="dim")
    while True:
        try:
            question = input("> ")
        except EOFError:
            shown.print()
            return
        if not question.strip():
            continue
        try:
            talk.ask(question)
        except KeyboardInterrupt:
            shown.print("\n(stopped)", style="dim")
        except Failure as failure:
            # The conversation goes on: the next question may find its model loaded.
            click.echo(f"slotpool: {failure.message}", err=True)


def only_model(pool: Pool) -> str:
    """The one model that the pool has. Raises `Failure` with their names where there are others."""
    names: list[Any] = [row["id"] for row in pool.get("/v1/models")["data"]]
    if len(names) != 1:
        listed = ", ".join(map(str, names)) or "none"
        raise Misuse(f"name a model: slotpool chat MODEL; there are {listed}")
    return str(names[0])
