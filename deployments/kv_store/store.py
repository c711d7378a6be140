"""The saved conversations of one node: in memory, and on its disk where a folder is configured."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from deployments.kv_store.entry import as_tokens, common_prefix
from deployments.kv_store.folder import Folder, Saved
from deployments.kv_store.places import Places


class KvStore:
    """What an engine finds and saves. All of it blocks, for as long as a disk does."""

    def __init__(self, places: Places) -> None:
        self._memory = places.memory_folder()
        self._disk = places.disk_folder()

    def find(self, fingerprint: bytes, prompt: Sequence[int], more_than: int) -> Saved | None:
        """The conversation that begins with the most of a prompt's tokens; None if that is not `more_than`."""
        wanted = as_tokens(prompt)
        folders: list[Folder] = [self._memory, *filter(None, [self._disk])]
        found = [
            (common, -at, name)
            for at, folder in enumerate(folders)
            for name, head in folder.heads(fingerprint).items()
            if (common := common_prefix(head.tokens, wanted)) > more_than
        ]
        for _, at, name in sorted(found, reverse=True):
            saved = folders[-at].load(name, wanted)
            if saved is not None:
                return saved
        return None

    def save(
        self,
        fingerprint: bytes,
        tokens: Sequence[int],
        state_bytes: int,
        fill: Callable[[memoryview], None],
        until: float,
    ) -> int:
        """Keep a sequence in memory: see `Folder.save`."""
        return self._memory.save(fingerprint, as_tokens(tokens), state_bytes, fill, until)
