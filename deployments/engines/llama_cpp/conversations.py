"""Conversations that outlive the engine: what of its slots is saved at its end, and what of a prompt was saved before.

An entry of the store belongs to the engines with the same fingerprint: the same weights in the same files, the same
shape of the cache, the same llama.cpp. Whoever asks gets it, as with the slots' own caches: it changes how long an
answer takes, and nothing of the answer.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from deployments.engines.llama_cpp.library import load_library
from deployments.engines.llama_cpp.loop import DecodeLoop
from deployments.engines.llama_cpp.prefix import Slot
from deployments.engines.llama_cpp.runtime import Runtime, RuntimeOptions
from deployments.engines.llama_cpp.sequence import LlamaGeneration
from deployments.engines.protocol import Saving
from deployments.kv_store.entry import FINGERPRINT_BYTES
from deployments.kv_store.folder import NoRoom, Saved
from deployments.kv_store.store import KvStore

log = logging.getLogger(__name__)

#: Shorter sequences are evaluated again sooner than anybody notices.
LEAST_TOKENS = 256
#: What an engine that ends may take to save its sequences, in seconds. One that would not be written within that time
#: at this rate, in bytes per second, is not begun.
SAVE_S = 3.0
SAVE_RATE = 1 << 30
#: What a request waits for its conversation at most, in seconds. Only a disk that hangs takes so long.
RECALL_S = 5.0
#: So much of a file's beginning and end, in bytes, with its size and its time, tells it from all others.
SAMPLE = 1 << 16


class Conversations:
    """The saved conversations of one loaded model."""

    def __init__(self, store: KvStore, runtime: Runtime, options: RuntimeOptions) -> None:
        """Blocks for milliseconds: it reads some of the model's file."""
        self._store, self._runtime = store, runtime
        self._fingerprint = fingerprint(runtime, options)
        self._threads = ThreadPoolExecutor(2, "kv-store")
        self._is_stuck = False

    async def recall(self, generations: Sequence[LlamaGeneration], loop: DecodeLoop) -> None:
        """Give the generations what was saved of their prompts, where the slots do not hold it anyway.

        Of several with one prompt the first gets it, and lends it to the others.
        """
        sought: set[tuple[int, ...]] = set()
        for generation in generations:
            prompt = generation.prompt
            if len(prompt) < LEAST_TOKENS or generation.needs_all_outputs or tuple(prompt) in sought:
                continue
            held = loop.held(prompt)
            if len(prompt) - held >= loop.gain and not self._is_stuck:
                sought.add(tuple(prompt))
                generation.saved = await self._find(prompt, held + loop.gain - 1)
                generation.restored = 0

    async def _find(self, prompt: list[int], more_than: int) -> Saved | None:
        work = self._threads.submit(self._store.find, self._fingerprint, prompt, more_than)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(work), RECALL_S)
        except TimeoutError:
            log.error("the store of conversations does not answer within %g s and is left aside", RECALL_S)
            self._is_stuck = True
        except (OSError, MemoryError):
            log.exception("a saved conversation cannot be read")
        return None

    def save(self, slots: Sequence[Slot]) -> Saving:
        """Keep what the slots hold, the most recently used first. Blocks. The decode loop must have stopped."""
        started = time.monotonic()
        count = total = 0
        for slot in sorted(slots, key=lambda each: -each.used_at):
            if len(slot.cached) < LEAST_TOKENS:
                continue
            try:
                saved = self._save(slot, started + SAVE_S)
            except (NoRoom, OSError, ValueError) as error:
                log.warning("a conversation of %d tokens is not saved: %s", len(slot.cached), error)
                continue
            count, total = count + (saved > 0), total + saved
        return Saving(count, total, (time.monotonic() - started) * 1e3)

    def _save(self, slot: Slot, until: float) -> int:
        runtime = self._runtime
        if runtime.has_pending_copies or not runtime.holds(slot.number, len(slot.cached)):
            return 0

        def fill(memory: memoryview) -> None:
            if not runtime.save_state(slot.number, memory):
                raise ValueError("llama.cpp does not give its state")

        size = runtime.state_bytes(slot.number)
        if size > (until - time.monotonic()) * SAVE_RATE:
            raise NoRoom("there is no time to write it")
        return self._store.save(self._fingerprint, slot.cached, size, fill, until) if size else 0


def fingerprint(runtime: Runtime, options: RuntimeOptions) -> bytes:
    """What two engines have in common if one can go on with the other's state."""
    digest = hashlib.blake2b(digest_size=FINGERPRINT_BYTES)
    for path in [*_files(Path(options.model_path)), *(Path(path) for path, _ in options.lora)]:
        status = path.stat()
        with path.open("rb") as file:
            digest.update(file.read(SAMPLE))
            file.seek(max(0, status.st_size - SAMPLE))
            digest.update(file.read(SAMPLE))
        digest.update(f"{status.st_size} {status.st_mtime_ns}".encode())
    shape = {
        "slots": options.slots,
        "context": runtime.n_ctx,
        "keys": options.type_k,
        "values": options.type_v,
        "flash_attention": options.flash_attn,
        "adapters": [scale for _, scale in options.lora],
        "llama_cpp": load_library().__version__,
    }
    digest.update(json.dumps(shape, sort_keys=True).encode())
    return digest.digest()


def _files(path: Path) -> list[Path]:
    """All parts of a model."""
    split = re.search(r"-00001-of-(\d{5})\.gguf$", path.name)
    if split is None:
        return [path]
    return sorted(path.parent.glob(path.name.replace("-00001-of-", "-?????-of-")))
