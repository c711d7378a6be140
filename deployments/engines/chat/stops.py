"""Stop strings: cuts a text that arrives piece by piece where the first stop string begins, and never
leaks a part of one.

The scanner holds back the longest tail that could still become a stop string. Only that tail is looked at again, so
the cost per piece does not grow with the length of the answer.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopScanner:
    """Feed it text with `push`; `flush` at the end gives back what was held without need. Pure, no I/O."""

    __slots__ = ("_held", "_reach", "_stops", "stopped_by")

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._reach = max((len(stop) for stop in self._stops), default=0) - 1
        self._held = ""
        self.stopped_by: str | None = None

    def push(self, text: str) -> str:
        """The text that may be shown now. Once a stop string was seen, `stopped_by` names it and nothing more comes."""
        if not self._stops:
            return text
        if self.stopped_by is not None:
            return ""
        buffer = self._held + text
        cut, stop = self._first_stop(buffer)
        if stop is not None:
            self.stopped_by, self._held = stop, ""
            return buffer[:cut]
        start = self._first_partial(buffer)
        self._held = buffer[start:]
        return buffer[:start]

    def flush(self) -> str:
        """The held tail, when the text has ended without a stop string."""
        held, self._held = self._held, ""
        return held

    def _first_stop(self, buffer: str) -> tuple[int, str | None]:
        """The stop string that is complete first, so that the answer does not depend on how the text was split."""
        best: tuple[int, int] | None = None
        found = None
        for stop in self._stops:
            at = buffer.find(stop)
            if at != -1 and (best is None or (at + len(stop), at) < best):
                best, found = (at + len(stop), at), stop
        return (best[1], found) if best else (len(buffer), None)

    def _first_partial(self, buffer: str) -> int:
        """Where the longest tail starts that is the beginning of a stop string."""
        for start in range(max(0, len(buffer) - self._reach), len(buffer)):
            tail = buffer[start:]
            if any(stop.startswith(tail) for stop in self._stops):
                return start
        return len(buffer)
