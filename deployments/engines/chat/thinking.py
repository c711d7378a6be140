"""Finds the thoughts that a model marks in its text: what stands between two marks at its beginning.

Most models write `<think>` and `</think>`, Mistral's `[THINK]` and `[/THINK]`, and Gemma 4 opens a channel for them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MARKS = {"<think>": "</think>", "[THINK]": "[/THINK]", "<|channel>thought": "<channel|>"}
#: Control tokens among them, which engines do not show as text unless they are asked to.
CONTROL = ("<|channel>", "<channel|>")

Piece = tuple[Literal["text", "reasoning"], str]


def is_opened(prompt: str) -> bool:
    """Whether a prompt ends with a mark that opens thoughts: some templates write it themselves."""
    return prompt.rstrip().endswith(tuple(MARKS))


def is_marked_by_tokens(template: str) -> bool:
    """Whether the model of a chat template marks its thoughts with control tokens."""
    return any(mark in template for mark in CONTROL)


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
    #: What closes the thoughts: where the template has opened them, any mark that does.
    _closes: tuple[str, ...] = tuple(MARKS.values())

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
            opened = next((mark for mark in MARKS if begun.startswith(mark)), None)
            if opened is None:
                is_partial = any(mark.startswith(begun) for mark in MARKS)
                return [] if is_partial else self._rest("text")
            self._state, self._held, self._closes = "opened", begun.removeprefix(opened), (MARKS[opened],)
        if self._state == "opened":
            self._held = self._held.lstrip("\n")
            self._state = "reasoning" if self._held else "opened"
        if self._state == "reasoning":
            found = [(at, mark) for mark in self._closes if (at := self._held.find(mark)) >= 0]
            if not found:
                keep = max(_partial(self._held, mark) for mark in self._closes)
                cut = len(self._held) - keep
                thought, self._held = self._held[:cut], self._held[cut:]
            else:
                at, mark = min(found)
                thought, self._state, self._held = self._held[:at], "gap", self._held[at + len(mark) :]
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


def _partial(text: str, mark: str) -> int:
    """How long a tail of `text` is the beginning of a mark."""
    for length in range(min(len(mark) - 1, len(text)), 0, -1):
        if mark.startswith(text[-length:]):
            return length
    return 0
