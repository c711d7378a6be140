"""From a call to tokens, and what this library cannot do: it is refused here, before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.errors import InvalidRequest, UnsupportedParameter
from deployments.engines.chat.prepare import Preparer
from deployments.engines.chat.request import GenerationOptions, Sampling
from deployments.engines.chat.template import ChatTemplate
from deployments.engines.chat.tools import ToolPlan

MAX_BEAMS = 16


@dataclass(frozen=True, slots=True)
class Decoding:
    """How CTranslate2 decodes; sequences of one batch have it in common. `limit` is set with beams only."""

    beam_size: int = 1
    top_k: int = 1
    top_p: float = 1.0
    temperature: float = 1.0
    repetition_penalty: float = 1.0
    ignore_eos: bool = False
    limit: int = 0

    @classmethod
    def of(cls, body: Mapping[str, Any], options: GenerationOptions, limit: int) -> Decoding:
        """What a request asks for. Raises `InvalidRequest`."""
        sampling, beams = options.sampling, _beams(body)
        penalty = sampling.repeat_penalty or 1.0
        if sampling.greedy or beams > 1:
            return cls(
                beams, repetition_penalty=penalty, ignore_eos=options.ignore_eos, limit=limit if beams > 1 else 0
            )
        # 0 is the whole vocabulary.
        return cls(1, sampling.top_k, sampling.top_p, sampling.temperature, penalty, options.ignore_eos)


class Ct2Vocabulary:
    """The model's tokens. Thread-safe."""

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

    def names(self, tokens: list[int]) -> list[str]:
        """The tokens as CTranslate2 takes them: by their names."""
        return [self.tokenizer.id_to_token(token) for token in tokens]

    def text(self, tokens: list[int]) -> str:
        """What some tokens say."""
        said: str = self.tokenizer.decode(tokens, skip_special_tokens=False)
        return said

    def piece(self, token: int, *, special: bool = False) -> bytes:
        return self.text([token]).encode()


class Ct2Preparer(Preparer):
    """Prepares calls for one loaded model."""

    def __init__(
        self, vocabulary: Ct2Vocabulary, template: ChatTemplate | None, *, enable_thinking: bool | None = None
    ) -> None:
        super().__init__(vocabulary, template, enable_thinking=enable_thinking)
        self.vocabulary = vocabulary

    def _text(self, tokens: list[int]) -> str:
        # A token by itself may be a part of a character.
        return self.vocabulary.text(tokens)

    def _grammar(self, body: Mapping[str, Any], options: GenerationOptions, plan: ToolPlan) -> None:
        """No grammar: whatever would need one, or other scores than the library can make, is refused."""
        needs = {
            "response_format": options.response_format.kind != "text",
            "grammar": body.get("grammar") is not None,
            "tool_choice": plan.mode == "forced",
            "logprobs": options.top_logprobs is not None,
            **_unsupported(options.sampling),
        }
        for name, is_asked in needs.items():
            if is_asked:
                raise UnsupportedParameter(f"{name} is not supported by CTranslate2", param=name)
        _beams(body)


def _unsupported(sampling: Sampling) -> dict[str, bool]:
    """The fields of the sampling that the library does not have, and whether they would change the answer."""
    return {
        # It has one seed for the whole process; without chance none is needed.
        "seed": sampling.seed is not None and not sampling.greedy,
        "min_p": sampling.min_p > 0.0 and not sampling.greedy,
        "frequency_penalty": sampling.frequency_penalty != 0.0,
        "presence_penalty": sampling.presence_penalty != 0.0,
        "logit_bias": bool(sampling.logit_bias),
    }


def _beams(body: Mapping[str, Any]) -> int:
    beams = body.get("beam_size")
    if beams is None:
        return 1
    if isinstance(beams, bool) or not isinstance(beams, int) or not 1 <= beams <= MAX_BEAMS:
        raise InvalidRequest(f"beam_size must be a number from 1 to {MAX_BEAMS}", param="beam_size")
    return beams
