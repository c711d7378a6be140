"""Ids that may still be heard of, though they are history: remembered for a while, in bounded room."""

from __future__ import annotations

from cluster.ledger.books.queue import INFINITY


class Memory:
    """A bounded memory of ids, forgotten after `keep_s` to `2 * keep_s` seconds or `limit` to `2 * limit` entries."""

    __slots__ = ("keep_s", "limit", "old", "rotate_at", "young")

    def __init__(self, limit: int, keep_s: float) -> None:
        self.limit = limit
        self.keep_s = keep_s
        self.rotate_at = -INFINITY
        self.young: set[str] = set()
        self.old: set[str] = set()

    def add(self, key: str, now: float) -> None:
        self._rotate(now)
        self.young.add(key)

    def __contains__(self, key: str) -> bool:
        return key in self.young or key in self.old

    def fade(self, now: float) -> None:
        """Forget what is too old; called whenever time has passed."""
        if self.young or self.old:
            self._rotate(now)

    def _rotate(self, now: float) -> None:
        if now >= self.rotate_at or len(self.young) >= self.limit:
            # After a pause of two periods nothing is fresh enough to be kept.
            self.old = self.young if now < self.rotate_at + self.keep_s else set()
            self.young = set()
            self.rotate_at = now + self.keep_s
