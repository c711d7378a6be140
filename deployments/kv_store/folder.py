"""A folder of saved conversations with a budget, used by several processes of one user at once.

An entry is written under another name and renamed when it is whole, and never changed afterwards: whoever finds one
finds all of it, and one that is being read may be removed. Room is made and taken under a lock: a file that is not
whole yet has its full size already, and counts. It is locked by its writer as well, so that what a killed writer has
left behind is known by its lock being free. The least recently used goes first; an entry's time of change says when
that was.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import mmap
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from deployments.kv_store.entry import SUFFIX, BadEntry, Head, Tokens, checksum, common_prefix, state_offset

logger = logging.getLogger("slotpool.kv_store")

_UNFINISHED = ".part"
_LOCK = "lock"
#: A new entry takes the place of an older one that has so much of its own beginning in common with it: what the older
#: one had beyond that is mostly an answer that its client wrote down in other tokens.
COVERED = 0.95
#: A sequence that holds fewer tokens than this beyond what is saved already is not saved again.
NEWS = 32


class NoRoom(Exception):
    """The entry is not kept; the message says why."""


@dataclass(slots=True)
class Saved:
    """A conversation that was found: its tokens, how many of a prompt's they are, and its state.

    `state` is a file's memory, or a copy of it, and is freed with this object.
    """

    tokens: list[int]
    common: int
    state: memoryview


class Folder:
    """The entries below `path`, a private folder, together no larger than `budget_bytes`. All of it blocks.

    `in_memory`: the files are memory, so a state is used where it lies. From a disk it is read, since a disk that fails
    then raises an error, and does not end the process.
    """

    def __init__(self, path: Path, budget_bytes: int, *, in_memory: bool) -> None:
        self._path, self._budget, self._in_memory = path, budget_bytes, in_memory
        self._heads: dict[str, Head] = {}

    def heads(self, fingerprint: bytes) -> dict[str, Head]:
        """The heads of all entries with this fingerprint, by their names. What is broken is removed and logged."""
        names = {name for name in self.names() if name.startswith(_prefix(fingerprint))}
        heads = {name: head for name, head in self._heads.items() if name in names}
        for name in names - heads.keys():
            with contextlib.suppress(OSError), self._checked(name), open(self._path / name, "rb") as file:
                head = Head.read(file)
                if head.fingerprint != fingerprint:
                    raise BadEntry("it is another model's")
                heads[name] = head
        self._heads = heads
        return heads

    def names(self) -> set[str]:
        with contextlib.suppress(OSError):
            return {name for name in os.listdir(self._path) if name.endswith(SUFFIX)}
        return set()

    def load(self, name: str, prompt: Tokens) -> Saved | None:
        """An entry with its state, checked. None where it is gone or broken, which is logged; then it is removed."""
        with contextlib.suppress(OSError), self._checked(name), open(self._path / name, "rb") as file:
            head = Head.read(file)
            state = self._state(file, head)
            if checksum(state) != head.state_checksum:
                raise BadEntry("its state is damaged")
            os.utime(file.fileno())
            return Saved(head.tokens.tolist(), common_prefix(head.tokens, prompt), state)
        return None

    def save(
        self, fingerprint: bytes, tokens: Tokens, state_bytes: int, fill: Callable[[memoryview], None], until: float
    ) -> int:
        """Keep a sequence; how many bytes that took, 0 where what is there has it already.

        `fill` writes the state into the memory it gets. `until` (monotonic) bounds the wait for other processes. Raises
        `NoRoom`, `OSError`, and what `fill` raises; then nothing is kept.
        """
        for name, head in self.heads(fingerprint).items():
            if len(tokens) - common_prefix(head.tokens, tokens) < NEWS:
                self._touch(name)
                return 0
        start = state_offset(len(tokens))
        size = start + state_bytes
        with self._new(fingerprint, size, until) as file, mmap.mmap(file.fileno(), size) as memory:
            with memoryview(memory) as whole, whole[start:] as state:
                fill(state)
                head = Head(fingerprint, tokens, state_bytes, checksum(state))
            packed = head.packed()
            memory[: len(packed)] = packed
        self._remove_covered(fingerprint, tokens)
        return size

    def copy_in(self, name: str, source: Path, until: float) -> None:
        """Take over an entry of another folder, under its name. Raises `NoRoom`, `BadEntry`, `OSError`."""
        with open(source, "rb") as file:
            head = Head.read(file)
            file.seek(0)
            with self._new(head.fingerprint, os.fstat(file.fileno()).st_size, until, name) as target:
                shutil.copyfileobj(file, target, 1 << 20)
        self._remove_covered(head.fingerprint, head.tokens, but=name)

    # --- private

    @contextlib.contextmanager
    def _new(self, fingerprint: bytes, size: int, until: float, name: str = "") -> Iterator[BinaryIO]:
        """A file of that size to be written, which becomes an entry if that raises nothing."""
        token = secrets.token_hex(8)
        unfinished = self._path / f"{token}{_UNFINISHED}"
        with self._locked(until):
            self._make_room(size)
            file = os.fdopen(os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600), "rb+")
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.truncate(size)
        try:
            if self._in_memory:
                # Memory that cannot be had when it is written to would end the process; asked for, it is an error.
                os.posix_fallocate(file.fileno(), 0, size)
            yield file
            file.flush()
            os.rename(unfinished, self._path / (name or f"{_prefix(fingerprint)}{token}{SUFFIX}"))
        finally:
            file.close()
            with contextlib.suppress(OSError):
                unfinished.unlink()

    def _make_room(self, size: int) -> None:
        """Remove what was used least recently until so much more fits. The lock is held."""
        entries: list[tuple[int, int, Path]] = []
        held = size
        for each in list(os.scandir(self._path)):
            if not each.name.endswith((SUFFIX, _UNFINISHED)):
                continue
            with contextlib.suppress(FileNotFoundError):
                status = each.stat()
                if each.name.endswith(SUFFIX):
                    entries.append((status.st_mtime_ns, status.st_size, Path(each.path)))
                elif _is_abandoned(each.path):
                    os.unlink(each.path)
                    continue
                held += status.st_size
        if held - sum(entry_size for _, entry_size, _ in entries) > self._budget:
            raise NoRoom(f"{size >> 20} MiB are more than the store may hold")
        for _, entry_size, path in sorted(entries):
            if held <= self._budget:
                return
            path.unlink(missing_ok=True)
            held -= entry_size

    def _remove_covered(self, fingerprint: bytes, tokens: Tokens, but: str = "") -> None:
        """Remove the entries that a new one makes superfluous."""
        for name, head in self.heads(fingerprint).items():
            common = common_prefix(head.tokens, tokens)
            if name != but and COVERED * len(head.tokens) <= common and len(head.tokens) < len(tokens):
                (self._path / name).unlink(missing_ok=True)

    def _state(self, file: BinaryIO, head: Head) -> memoryview:
        if self._in_memory:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))[head.state_at :]
        file.seek(head.state_at)
        state = file.read(head.state_bytes)
        if len(state) != head.state_bytes:
            raise BadEntry("it ends in its state")
        return memoryview(state)

    @contextlib.contextmanager
    def _checked(self, name: str) -> Iterator[None]:
        """Log and remove an entry that turns out to be broken; what is raised then is an `OSError`."""
        try:
            yield
        except BadEntry as error:
            logger.warning("the saved conversation %s is not used and removed: %s", name, error)
            (self._path / name).unlink(missing_ok=True)
            raise FileNotFoundError(name) from None

    def _touch(self, name: str) -> None:
        with contextlib.suppress(OSError):
            os.utime(self._path / name)

    @contextlib.contextmanager
    def _locked(self, until: float) -> Iterator[None]:
        with open(self._path / _LOCK, "wb", opener=_private) as lock:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > until:
                        raise NoRoom("another process does not let go of the store") from None
                    time.sleep(0.002)
            yield


def _prefix(fingerprint: bytes) -> str:
    """What the names of all entries with this fingerprint begin with."""
    return fingerprint.hex()[:24] + "-"


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _is_abandoned(path: str) -> bool:
    """Whether nobody writes an unfinished file any more."""
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
