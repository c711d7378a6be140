"""One sequence of ExLlamaV3, and the library's own job that makes its tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from deployments.engines.chat.generation import Generation, Job
from deployments.engines.chat.request import Sampling


@dataclass(slots=True, eq=False)
class ExllamaGeneration(Generation):
    """One sequence to generate. `grammar` is what `ExllamaPreparer` made of the format that is asked for."""

    grammar: str | None = None
    #: The library's job, while there is one.
    native: Any = None


ExllamaJob = Job[ExllamaGeneration]


class NativeJobs:
    """Makes the library's jobs for one loaded model."""

    def __init__(
        self, library: Any, tensor: Callable[[Any], Any], tokenizer: Any, ends: list[int], max_rq_tokens: int | None
    ) -> None:
        """`tensor` makes a tensor in the host's memory of a list; `ends` are the tokens that end an answer."""
        self._library, self._tensor, self._tokenizer = library, tensor, tokenizer
        self._ends, self._max_rq_tokens = ends, max_rq_tokens

    def make(self, generation: ExllamaGeneration) -> Any:
        """The job of one sequence, which finds its way back by its `identifier`."""
        return self._library.Job(
            input_ids=self._tensor([generation.prompt]),
            max_new_tokens=generation.limit,
            sampler=self._sampler(generation.sampling),
            seed=generation.sampling.seed,
            # Stop strings are looked for in the text, as for every engine here.
            stop_conditions=[] if generation.ignore_eos else self._ends,
            decode_special_tokens=generation.special,
            # The scores before they are reshaped: probabilities of what was drawn from would be others.
            return_logits=generation.top_logprobs is not None,
            filters=[] if generation.grammar is None else [self.filter(generation.grammar)],
            identifier=generation,
            max_rq_tokens=self._max_rq_tokens,
        )

    def filter(self, grammar: str) -> Any:
        """What holds one sequence to a format. Raises `ValueError` or what else the library says of a bad one."""
        return self._library.LLGuidanceFilter(self._tokenizer, eos_after_completed=True, **json.loads(grammar))

    def _sampler(self, sampling: Sampling) -> Any:
        return self._library.ComboSampler(
            rep_p=sampling.repeat_penalty or 1.0,
            freq_p=sampling.frequency_penalty,
            pres_p=sampling.presence_penalty,
            temperature=0.0 if sampling.greedy else sampling.temperature,
            min_p=sampling.min_p,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            logit_bias=dict(sampling.logit_bias) or None,
        )
