"""What of a prompt needs no evaluation: a slot's cache, another slot's, or a conversation saved by an earlier engine.

It decides in which slot a prompt goes and brings the cache of that slot as near to the prompt as it can. Only the
decode thread may call it, but for `held`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from deployments.engines.llama_cpp.runtime import Runtime
from deployments.engines.llama_cpp.sequence import LlamaGeneration

log = logging.getLogger(__name__)

#: Copying another slot's whole cache pays when it saves this many prompt tokens (docs/measurements.md).
COPY_GAIN = 64


@dataclass(slots=True, eq=False)
class Slot:
    """One sequence of the KV cache. `cached` is what it holds, kept after a generation for the next one's prefix."""

    number: int
    cached: list[int] = field(default_factory=list)
    generation: LlamaGeneration | None = None
    next_token: int | None = None
    used_at: float = 0.0


class Prefixes:
    """The caches of a runtime's slots, seen as beginnings of prompts. `gain` is what a copy must save, in tokens."""

    def __init__(self, runtime: Runtime, slots: Sequence[Slot]) -> None:
        self._runtime, self._slots = runtime, slots
        self.gain = max(COPY_GAIN, runtime.n_ctx // 64)

    def held(self, prompt: list[int]) -> int:
        """How much of a prompt some slot holds now. From another thread it is a hint: the next step may change it."""
        return max(common_prefix(slot.cached, prompt) for slot in self._slots)

    def choose(self, idle: Sequence[Slot], generation: LlamaGeneration) -> Slot:
        """The idle slot whose cache is worth most to the prompt; to one that is restored, the one worth least.

        The longest common prefix wins; among equals the one unused for longest.
        """
        prompt = generation.prompt
        best = max(idle, key=lambda slot: (common_prefix(slot.cached, prompt), -slot.used_at))
        if self._is_better(generation, common_prefix(best.cached, prompt)):
            return min(idle, key=lambda slot: slot.used_at)
        return best

    def reach(self, slot: Slot, generation: LlamaGeneration) -> int:
        """How many tokens of the prompt would not be evaluated in this slot, what others hold left aside."""
        saved = 0 if generation.saved is None else generation.saved.common
        return max(saved, common_prefix(slot.cached, generation.prompt))

    def fill(self, slot: Slot, generation: LlamaGeneration) -> None:
        """Have the slot hold as much of the prompt as can be had, and nothing else."""
        prompt = generation.prompt
        own = common_prefix(slot.cached, prompt)
        donor = max(self._slots, key=lambda each: common_prefix(each.cached, prompt))
        lent = common_prefix(donor.cached, prompt)
        is_restored = False
        if self._is_better(generation, max(own, lent)):
            is_restored = self._restore(slot, generation)
        elif lent - own >= self.gain:
            self._runtime.copy_slot(donor.number, slot.number)
            slot.cached = list(donor.cached)
        # At least one token is evaluated again, since its scores choose the first new one.
        own = common_prefix(slot.cached, prompt)
        keep = 0 if generation.needs_all_outputs else min(own, len(prompt) - 1)
        if not self._runtime.keep_prefix(slot.number, keep):
            keep = 0
        slot.cached = prompt[:keep]
        generation.reused = keep
        generation.saved = None
        if is_restored:
            generation.restored = keep

    def _is_better(self, generation: LlamaGeneration, held: int) -> bool:
        """Whether a saved conversation has enough that the slots have not."""
        return generation.saved is not None and generation.saved.common - held >= self.gain

    def _restore(self, slot: Slot, generation: LlamaGeneration) -> bool:
        saved = generation.saved
        assert saved is not None
        slot.cached = []
        if not self._runtime.restore_state(slot.number, saved.state, len(saved.tokens)):
            log.warning("a saved conversation of %d tokens could not be restored", len(saved.tokens))
            return False
        slot.cached = saved.tokens
        return True


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """With how many equal tokens both begin."""
    length = min(len(left), len(right))
    low, high = 0, length
    # Comparing slices runs in C, so a binary search beats a loop over the tokens.
    while low < high:
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
