"""Prepares calls for engines whose tokenizer is a file of Hugging Face's."""

from __future__ import annotations

from deployments.engines.chat.hf_vocabulary import HfVocabulary
from deployments.engines.chat.prepare import Preparer
from deployments.engines.chat.template import ChatTemplate


class HfPreparer(Preparer):
    """Prepares calls for one loaded model; each engine says what its library can."""

    def __init__(
        self, vocabulary: HfVocabulary, template: ChatTemplate | None, *, enable_thinking: bool | None = None
    ) -> None:
        super().__init__(vocabulary, template, enable_thinking=enable_thinking)
        self._vocabulary = vocabulary

    def _text(self, tokens: list[int]) -> str:
        # A token by itself may be a part of a character.
        return self._vocabulary.text(tokens)
