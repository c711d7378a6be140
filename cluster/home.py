"""The folders of this pool on one machine: of its sockets, and of what it keeps in memory beside its processes.

They are its user's own, closed to everybody else, and end with Ray on that machine.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from cluster.frames import make_private

#: Where the packages lie, for interpreters that are started here.
ROOT = str(Path(__file__).resolve().parent.parent)
#: Linux's file system in memory, which everybody may write to.
MEMORY = Path("/dev/shm")


@dataclass(frozen=True, slots=True)
class Home:
    """Where the sockets of one Ray on this machine lie: the folder, and the raylet."""

    folder: Path
    raylet: int

    def make_memory_folder(self) -> Path:
        """The folder whose files are memory, made where it is not there. Raises `OSError` where there is none."""
        folder = memory_folder(self.folder)
        make_private(folder.parent)
        return make_private(folder)


def memory_folder(folder: Path) -> Path:
    """The counterpart in memory of a home's folder, whether it is there or not."""
    return MEMORY / f"slotpool-{os.geteuid()}" / folder.name


def home_of(raylet: int) -> Home:
    """The folder for this Ray, this code and this interpreter, made where it is not there. Blocks for a moment.

    Not in Ray's own, which everybody may write to. Raises `PermissionError` where another user has made it.
    """
    born = Path("/proc", str(raylet), "stat").read_text().rsplit(") ", 1)[1].split()[19]
    base = make_private(Path(f"/tmp/slotpool-{os.geteuid()}"))
    _remove_left_over(base)
    _remove_left_over(MEMORY / base.name)
    code = hashlib.sha256(f"{ROOT} {sys.executable}".encode()).hexdigest()[:8]
    return Home(make_private(base / f"{raylet}-{born}-{code}"), raylet)


def _remove_left_over(base: Path) -> None:
    """Remove what a Ray that was killed has left behind."""
    for folder in base.iterdir() if base.is_dir() else ():
        raylet, born, *_ = (*folder.name.split("-"), "", "")
        try:
            is_there = Path("/proc", raylet, "stat").read_text().rsplit(") ", 1)[1].split()[19] == born
        except (OSError, IndexError):
            is_there = False
        if raylet.isdigit() and not is_there:
            shutil.rmtree(folder, ignore_errors=True)
