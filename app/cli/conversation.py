"""A conversation with one model, whose answers are printed as they come."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from app.cli.output import Failure, console, printable, seconds
from app.cli.pool import Pool, refusal

if TYPE_CHECKING:
    from rich.console import Console


class Sampling(NamedTuple):
    """How the model is to answer; None leaves it the choice."""

    max_tokens: int | None = None
    temperature: float | None = None


class Conversation:
    """Messages so far, and the model that answers the next one. An answer that was broken off stays as it came."""

    def __init__(self, pool: Pool, model: str, system: str | None, sampling: Sampling) -> None:
        self.model = model
        self.messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
        self._pool = pool
        self._sampling = {name: value for name, value in sampling._asdict().items() if value is not None}

    def ask(self, question: str) -> None:
        """Put a question, and print the answer as it comes. Raises `Failure`; the question is then forgotten."""
        self.messages.append({"role": "user", "content": question})
        answer = ""
        notes = console(stderr=True)
        try:
            for text in self._answer(notes):
                answer += text
                click.echo(printable(text), nl=False)
            click.echo()
        finally:
            if answer:
                self.messages.append({"role": "assistant", "content": answer})
            else:
                self.messages.pop()

    def _answer(self, notes: Console) -> Iterator[str]:
        """The parts of the answer. Where it waits, what it thinks and how fast it was go to the terminal beside it."""
        body = {
            "model": self.model,
            "messages": self.messages,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._sampling,
        }
        asked_at = time.monotonic()
        first_at: float | None = None
        usage: dict[str, Any] = {}
        with (
            self._pool.lines("POST", "/v1/chat/completions", json=body) as lines,
            notes.status("", spinner="dots") if notes.is_terminal else contextlib.nullcontext() as waiting,
        ):
            for line in lines:
                if line.startswith(": ") and waiting is not None:
                    waiting.update(printable(line[2:]))
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = read(line)
                usage = event.get("usage") or usage
                for choice in event.get("choices") or ():
                    delta = choice.get("delta") or {}
                    text, thought = delta.get("content"), delta.get("reasoning_content")
                    if (text or thought) and first_at is None:
                        first_at = time.monotonic()
                        if waiting is not None:
                            waiting.stop()
                    if thought and notes.is_terminal:
                        notes.print(printable(thought), style="dim italic", end="")
                    if text:
                        yield text
        if first_at is not None and notes.is_terminal:
            notes.print(f"\n({pace(usage, first_at - asked_at, time.monotonic() - first_at)})", style="dim", end="")


def pace(usage: dict[str, Any], ttft_s: float, rest_s: float) -> str:
    """How fast an answer was, in words."""
    tokens = int(usage.get("completion_tokens") or 0)
    rate = f", {(tokens - 1) / rest_s:.0f} tokens/s" if tokens > 1 and rest_s > 0 else ""
    return f"{tokens} tokens{rate}, the first after {seconds(ttft_s)}"


def read(line: str) -> dict[str, Any]:
    """What a line of the stream says. Raises `Failure` for an error, and for what nobody can read."""
    try:
        event = json.loads(line.removeprefix("data: "))
    except ValueError:
        raise Failure("the answer cannot be read: it is not JSON") from None
    if not isinstance(event, dict):
        raise Failure("the answer cannot be read: it is no object")
    if event.get("error"):
        raise Failure(refusal(int(event["error"].get("status") or 0), event))
    return event
