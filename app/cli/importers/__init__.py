"""Configurations of other programs, turned into the pool's own, with a line for everything that is left behind.

Each importer is a function of a `Source` that fills a `Draft`. None of them looks at the network or starts anything.
"""

from __future__ import annotations

from collections.abc import Callable

from app.cli.importers import litellm, llama_swap, ollama
from app.cli.importers.draft import Draft, Source

IMPORTERS: dict[str, Callable[[Source], Draft]] = {
    "llama-swap": llama_swap.convert,
    "litellm": litellm.convert,
    "ollama": ollama.convert,
}
