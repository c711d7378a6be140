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
    refuses or ignores in its own way, and it looks every `looks_s` seconds whether a client has left. So many tokens as
    `batch` are evaluated whoever leaves; 0 is for an engine that can stop soon enough on any machine. One that
    `is_external` is not loaded and unloaded by the pool, either. `start` runs the pool that answers. `is_there` tells
    whether what the engine needs outside of this environment is installed. One that is `on_gpu` runs there only.
    """

    name: str
    needs: tuple[str, ...]
    model: Callable[[Path], dict[str, Any]]
    broken: Callable[[Path], dict[str, Any]]
    reference: Callable[[Path], AbstractAsyncContextManager[Reference]] | None = None
    cannot: frozenset[str] = frozenset()
    writes: bool = True
    relays: bool = False
    is_external: bool = False
    on_gpu: bool = False
    looks_s: float = 0.0
    batch: int = 0
    start: Callable[[Entry, Path], AbstractAsyncContextManager[OneModel]] = field(default=supervised)
    is_there: Callable[[], bool] = lambda: True

    def skip_if_passed_on(self, what: str) -> None:
        """End a test of something that a server behind the pool does not do in OpenAI's way."""
        if self.relays and what in self.cannot:
            pytest.skip(f"{what} is this server's own affair")

    def skip_if_external(self) -> None:
        """End a test of a life that only the pool's own engines have."""
        if self.is_external:
            pytest.skip("the pool neither loads nor unloads it")
