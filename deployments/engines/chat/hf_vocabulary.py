"""The tokens of a model whose tokenizer is a file of Hugging Face's."""

from __future__ import annotations

from typing import Any


class HfVocabulary:
    """The tokens of a `tokenizer.json`, as the `tokenizers` library has it. Thread-safe."""

    embedding_size = 0

    def __init__(self, tokenizer: Any, bos: str, n_ctx: int) -> None:
        self.tokenizer, self.n_ctx = tokenizer, n_ctx
        self.vocab_size = int(tokenizer.get_vocab_size())
        self._bos = bos

    def bos_text(self) -> str:
        return self._bos

    def start_token(self) -> int:
        return self.id_of(self._bos) or 0

    def id_of(self, token: str) -> int | None:
        """The id of a token by its text."""
        found: int | None = self.tokenizer.token_to_id(token)
        return found

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=add_special).ids
        return ids

    def text(self, tokens: list[int]) -> str:
        """What some tokens say."""
        said: str = self.tokenizer.decode(tokens, skip_special_tokens=False)
        return said

    def piece(self, token: int, *, special: bool = False) -> bytes:
        return self.text([token]).encode()
