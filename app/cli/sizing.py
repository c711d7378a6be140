"""How many slots of how much context a GGUF model may have in a given memory."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from cluster.config import LlamaCppModel
from deployments.engines.registry import estimate_mib

#: What is tried, the best first: tokens of context for each slot, and slots.
CONTEXTS = (131072, 65536, 32768, 16384, 8192, 4096, 2048)
SLOTS = (16, 8, 4, 2, 1)
#: A model begins with at most so many slots, each with a context that is of use and no more than plenty.
FIRST_SLOTS, USEFUL, PLENTY = 8, 8192, 32768
#: The part of a memory that a model may have: the estimate is no measurement.
SHARE = 0.95


class Size(NamedTuple):
    """Slots, the context of each in tokens, and what a replica takes with them in MiB."""

    slots: int
    context: int
    memory_mib: int


class Sizing:
    """What fits of one model's file into `memory_mib`, on `num_gpus` or with 0 on the CPU; it knows `trained` tokens.

    Reads the file's header for each size that it tries, some milliseconds each.
    """

    def __init__(self, path: Path, trained: int, memory_mib: int, num_gpus: float) -> None:
        self._path = path
        self._memory_mib = memory_mib
        self._num_gpus = num_gpus
        self._contexts = tuple(dict.fromkeys(min(each, trained) for each in CONTEXTS))

    def all(self) -> list[Size]:
        """The longest context for each number of slots that fits at all."""
        return [found for slots in SLOTS if (found := self._longest(slots, self._contexts)) is not None]

    def first(self) -> Size | None:
        """What to begin with: the most slots with a useful context, else the longest context; None if nothing fits."""
        contexts = tuple(dict.fromkeys(min(each, PLENTY) for each in self._contexts))
        useful = tuple(each for each in contexts if each >= USEFUL) or contexts[:1]
        tries = [slots for slots in SLOTS if slots <= FIRST_SLOTS]
        for allowed in (useful, contexts):
            for slots in tries:
                found = self._longest(slots, allowed)
                if found is not None:
                    return found
        return None

    def takes_mib(self, slots: int, context: int) -> int | None:
        """What a replica takes with so many slots and so much context, in MiB; None if nothing can be told."""
        shape = {"target_inflight": slots, "gguf_n_ctx": context, "num_gpus": self._num_gpus}
        return estimate_mib(LlamaCppModel.model_validate({"model_path": str(self._path), **shape}), self._path)

    def _longest(self, slots: int, contexts: tuple[int, ...]) -> Size | None:
        for context in contexts:
            takes = self.takes_mib(slots, context)
            if takes is not None and takes <= self._memory_mib * SHARE:
                return Size(slots, context, takes)
        return None
