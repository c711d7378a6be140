"""Where a node keeps saved conversations, and how much of them: a folder in memory, and one on disk if configured.

What is in memory ends with Ray on this machine, or with the machine. The supervisor of a replica copies it to the disk
when an engine has ended, beside whatever comes next: no swap waits for a disk.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.config.store import KvStoreConfig
from cluster.frames import make_private
from cluster.home import Home
from deployments.host_memory import available_bytes
from deployments.kv_store.entry import BadEntry
from deployments.kv_store.folder import Folder, NoRoom

logger = logging.getLogger("slotpool.kv_store")

#: What is taken of the free memory where nothing is configured, and of the free room on a disk.
SHARE = 4
#: A copying to the disk goes on for so long at most, in seconds; and a replica that ends waits so long for it.
COPY_S = 60.0
LAST_COPY_S = 2.0


@dataclass(frozen=True, slots=True)
class Places:
    """Plain data, since it goes to the engine's process. `disk` is empty where no folder is configured."""

    memory: str
    memory_bytes: int
    disk: str = ""
    disk_bytes: int = 0

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Places:
        return cls(**data)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def memory_folder(self) -> Folder:
        return Folder(Path(self.memory), self.memory_bytes, in_memory=True)

    def disk_folder(self) -> Folder | None:
        return Folder(Path(self.disk), self.disk_bytes, in_memory=False) if self.disk else None


def places(home: Home, order: KvStoreConfig) -> Places | None:
    """The folders for this node, made where they are not there; None if there can be none in memory. Blocks."""
    try:
        memory = home.make_memory_folder()
        free = _free_bytes(memory) + _held_bytes(memory)
        share = min(available_bytes() + _held_bytes(memory), free) // SHARE
        budget = share if order.mib is None else min(order.mib << 20, free)
        disk = _disk_folder(order.folder)
        return Places(str(memory), budget, str(disk or ""), _disk_budget(disk))
    except OSError as error:
        logger.warning("conversations are not saved: %s", error)
        return None


class DiskCopy:
    """The copying of what is in memory to a disk, in a thread that no exit of the process waits for."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None

    def begin(self, places: Places) -> None:
        """Copy what is there now, if there is a disk and the last copying has ended. Does not block."""
        if places.disk and (self._thread is None or not self._thread.is_alive()):
            until = time.monotonic() + COPY_S
            self._thread = threading.Thread(target=copy_to_disk, args=(places, until), daemon=True)
            self._thread.start()

    async def finished(self) -> None:
        """Wait for it, `LAST_COPY_S` at most."""
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, LAST_COPY_S)


def copy_to_disk(places: Places, until: float) -> None:
    """Copy what is in memory only, the newest first, until that time (monotonic) at most. Blocks; raises nothing."""
    memory, disk = places.memory_folder(), places.disk_folder()
    tried: set[str] = set()
    while disk is not None and (new := memory.names() - disk.names() - tried):
        name = max(new, key=lambda each: _changed_at(Path(places.memory, each)))
        tried.add(name)
        try:
            disk.copy_in(name, Path(places.memory, name), until)
        except (OSError, NoRoom, BadEntry) as error:
            logger.warning("a conversation was not copied to kv_store_dir: %s", error)
        if time.monotonic() > until:
            return


def _disk_folder(configured: str | None) -> Path | None:
    if configured is None:
        return None
    base = Path(configured).expanduser()
    try:
        base.mkdir(parents=True, exist_ok=True)
        return make_private(base / f"slotpool-{os.geteuid()}")
    except OSError as error:
        logger.warning("kv_store_dir is not used: %s", error)
        return None


def _disk_budget(disk: Path | None) -> int:
    return 0 if disk is None else (_free_bytes(disk) + _held_bytes(disk)) // SHARE


def _changed_at(path: Path) -> float:
    """When a file was changed, in seconds since 1970; 0 if it is gone."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _free_bytes(folder: Path) -> int:
    filesystem = os.statvfs(folder)
    return filesystem.f_bavail * filesystem.f_frsize


def _held_bytes(folder: Path) -> int:
    total = 0
    for each in os.scandir(folder):
        try:
            total += each.stat().st_size
        except OSError:
            continue  # It has gone meanwhile.
    return total
