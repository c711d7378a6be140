"""From a call to tokens, and what this library cannot do: it is refused here, before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.errors import InvalidRequest, UnsupportedParameter
from deployments.engines.chat.hf_prepare import HfPreparer
from deployments.engines.chat.hf_vocabulary import HfVocabulary
from deployments.engines.chat.request import GenerationOptions, Sampling
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


class Ct2Vocabulary(HfVocabulary):
    """The model's tokens, by the names under which CTranslate2 takes them."""

    def names(self, tokens: list[int]) -> list[str]:
        """The tokens by their names."""
        return [self.tokenizer.id_to_token(token) for token in tokens]


class Ct2Preparer(HfPreparer):
    """Prepares calls for one loaded model."""

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
