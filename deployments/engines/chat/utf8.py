"""Text from token bytes: a character may be spread over several tokens, and none is shown before it is whole."""

from __future__ import annotations

import codecs

from deployments.engines.chat.stops import StopScanner

_decoder = codecs.getincrementaldecoder("utf-8")


class TextAssembler:
    """Turns the bytes of an answer's tokens into the text that may be shown: whole characters, no stop string."""

    __slots__ = ("_decode", "_scanner")

    def __init__(self, stops: tuple[str, ...] = ()) -> None:
        # Bytes that can never become a character are shown as U+FFFD, as every other OpenAI server does.
        self._decode = _decoder("replace").decode
        self._scanner = StopScanner(stops)

    @property
    def stopped(self) -> bool:
        return self._scanner.stopped_by is not None

    @property
    def stopped_by(self) -> str | None:
        """The stop string that has ended the answer, if one has."""
        return self._scanner.stopped_by

    def push(self, piece: bytes) -> str:
        """The text that this token releases; check `stopped` afterwards."""
        return self._scanner.push(self._decode(piece))

    def finish(self) -> str:
        """What is left when the answer ends: a held tail, and U+FFFD for a character that was cut off."""
        tail = self._scanner.push(self._decode(b"", True))
        return tail if self.stopped else tail + self._scanner.flush()
