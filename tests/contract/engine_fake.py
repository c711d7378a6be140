"""The fake engine: it has no model, so its own words and its own way to count them are the reference."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tests.contract.entry import Entry
from tests.contract.pool import MODEL, SLOTS
from tests.pool import fake


class Words:
    """A word is a token."""

    def count(self, text: str) -> int:
        return len(text.split())

    def count_chat(self, messages: list[dict[str, Any]]) -> int:
        return sum(self.count(message["content"]) for message in messages)

    def greedy(self, prompt: str, tokens: int) -> str:
        return "".join(f"{MODEL}:{index} " for index in range(tokens))


@asynccontextmanager
async def words(folder: Path) -> AsyncGenerator[Words, None]:
    yield Words()


FAKE = Entry(
    "fake",
    (),
    lambda folder: {**fake(tokens=400, tokens_per_s=100), "target_inflight": SLOTS},
    lambda folder: fake(fault="load_fails"),
    words,
    cannot=frozenset({"response_format", "tool_choice", "logprobs"}),
    writes=False,
)
