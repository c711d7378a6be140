"""Finds the thoughts that a model marks in its text: what stands between `<think>` and `</think>` at its beginning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

OPEN, CLOSE = "<think>", "</think>"

Piece = tuple[Literal["text", "reasoning"], str]


@dataclass(frozen=True, slots=True)
class Thought:
    """A piece of what a model thinks before it answers."""

    text: str


@dataclass(slots=True)
class ThinkingSplitter:
    """Splits a streamed text into thoughts and answer. Only a text that begins with the mark has thoughts.

    Some templates write the opening mark themselves, at the end of the prompt: the text then begins as `opened`.
    """

    _state: Literal["start", "opened", "reasoning", "gap", "text"] = "start"
    _held: str = ""

    @property
    def is_done(self) -> bool:
        """Whether all that follows is the answer."""
        return self._state == "text"

    def push(self, text: str) -> list[Piece]:
        """What this piece of text releases, in order. A tail that may become a mark is held back."""
        if self._state == "text":
            return [("text", text)] if text else []
        self._held += text
        out: list[Piece] = []
        if self._state == "start":
            begun = self._held.lstrip()
            if not begun or (OPEN.startswith(begun) and begun != OPEN):
                return []
            if not begun.startswith(OPEN):
                return self._rest("text")
            self._state, self._held = "opened", begun.removeprefix(OPEN)
        if self._state == "opened":
            self._held = self._held.lstrip("\n")
            self._state = "reasoning" if self._held else "opened"
        if self._state == "reasoning":
            thought, mark, rest = self._held.partition(CLOSE)
            if not mark:
                keep = _partial(thought)
                self._held = thought[len(thought) - keep :]
                thought = thought[: len(thought) - keep]
            else:
                self._state, self._held = "gap", rest
            if thought:
                out.append(("reasoning", thought))
        if self._state == "gap":
            self._held = self._held.lstrip("\n")
            if self._held:
                out += self._rest("text")
        return out

    def finish(self) -> list[Piece]:
        """What was held back to the end, and is no mark."""
        if not self._held:
            return []
        return self._rest("reasoning" if self._state == "reasoning" else "text")

    def _rest(self, kind: Literal["text", "reasoning"]) -> list[Piece]:
        held, self._held, self._state = self._held, "", "text"
        return [(kind, held)]


def _partial(text: str) -> int:
    """How long a tail of `text` is the beginning of the closing mark."""
    for length in range(min(len(CLOSE) - 1, len(text)), 0, -1):
        if CLOSE.startswith(text[-length:]):
            return length
    return 0
