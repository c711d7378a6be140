"""What the suite must know of an engine: one `Entry` for each, in a file of its own (`engine_NAME.py`)."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pytest

from tests.contract.pool import OneModel, Supervised


class Reference(Protocol):
    """What the engine's library, or the model's own tokenizer, says of a prompt by itself. Every method may block."""

    def count(self, text: str) -> int:
        """The tokens of a text, without the special ones that begin or end a prompt."""

    def count_chat(self, messages: list[dict[str, Any]]) -> int:
        """The tokens of a chat as the model sees it."""

    def greedy(self, prompt: str, tokens: int) -> str:
        """The greedy answer to one user message, of at most so many tokens."""


@asynccontextmanager
async def supervised(entry: Entry, folder: Path) -> AsyncGenerator[OneModel, None]:
    """The model on a supervised engine process, as in production, but for Ray."""
    model = entry.model(folder)
    async with Supervised.running(model) as pool:
        yield pool


@dataclass(frozen=True)
class Entry:
    """One engine under test. `needs` are the modules without which its tests are skipped.

    `model` makes the configuration of a model with at least `SLOTS` slots and 1024 tokens of context, in a folder that
    lasts as long as the session; `broken` is one that cannot be loaded. `reference` is None where nothing but the
    engine itself can tell. `cannot` holds the fields of a request that the engine refuses (`response_format`,
    `logprobs`, `seed`, `tool_choice`, `stop`, …), and `writes` is False for one that has no language model: what it
    says cannot be steered. One that `relays` is a server of another kind, and is asked as it is: what it `cannot` do it
    refuses or ignores in its own way. `start` runs the pool that answers. `is_there` tells whether what the engine
    needs outside of this environment is installed.
    """

    name: str
    needs: tuple[str, ...]
    model: Callable[[Path], dict[str, Any]]
    broken: Callable[[Path], dict[str, Any]]
    reference: Callable[[Path], AbstractAsyncContextManager[Reference]] | None = None
    cannot: frozenset[str] = frozenset()
    writes: bool = True
    relays: bool = False
    start: Callable[[Entry, Path], AbstractAsyncContextManager[OneModel]] = field(default=supervised)
    is_there: Callable[[], bool] = lambda: True

    def skip_if_passed_on(self, what: str) -> None:
        """End a test of something that a server behind the pool does not do in OpenAI's way."""
        if self.relays and what in self.cannot:
            pytest.skip(f"{what} is this server's own affair")
