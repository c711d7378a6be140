"""What is asked of a loaded model's tokens while a request is prepared."""

from __future__ import annotations

from typing import Protocol


class Vocabulary(Protocol):
    """The tokens of one model. Thread-safe: it is only read."""

    #: Tokens of one sequence, prompt and answer together.
    n_ctx: int
    #: Ids are below this.
    vocab_size: int
    #: How long an embedding is; 0 where there are none.
    embedding_size: int

    def bos_text(self) -> str:
        """The token that begins a prompt, as templates write it; empty where there is none."""

    def start_token(self) -> int:
        """What an empty prompt begins with: something must be evaluated."""

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """The tokens of a text. Raises `InvalidRequest`."""

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The bytes of one token; those of a control token are empty unless `special`."""
