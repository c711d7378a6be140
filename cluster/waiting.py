"""Waiting for a change inside one event loop: what the parked calls of the ledger actor have in common."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import NamedTuple


class Place(NamedTuple):
    """Where a request waits: `queued` at a position (from 1), or `loading` a model, `progress` of it (0.0 to 1.0)."""

    state: str
    where: int | str
    progress: float | None = None


class Signal:
    """Wakes all who wait for something to change; each then looks for itself whether it is what he waits for."""

    def __init__(self) -> None:
        self._fired = asyncio.Event()

    def fire(self) -> None:
        """Something has changed. Never blocks."""
        self._fired.set()
        self._fired = asyncio.Event()

    async def until(self, holds: Callable[[], bool], timeout_s: float | None = None) -> bool:
        """Wait until the condition holds, looking after every change; False if it still does not after the time."""
        try:
            async with asyncio.timeout(timeout_s):
                while not holds():
                    await self._fired.wait()
        except TimeoutError:
            return False
        return True
