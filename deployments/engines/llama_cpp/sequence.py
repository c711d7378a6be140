"""One sequence of llama.cpp: what its decode thread keeps of a generation beside what all engines do."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from deployments.engines.chat.generation import Generation, Job
from deployments.engines.chat.logprobs import TokenLogprob
from deployments.engines.llama_cpp.sampling import Grammar, Sampler
from deployments.kv_store.folder import Saved


@dataclass(slots=True, eq=False)
class LlamaGeneration(Generation):
    """One sequence to generate, or to embed."""

    grammar: Grammar | None = None
    #: Nothing is generated: the prompt's hidden states are what is wanted.
    embeds: bool = False

    #: Made when the sequence starts, and closed when it ends.
    sampler: Sampler | None = None
    #: What was found of the prompt among the saved conversations, until the sequence has a slot.
    saved: Saved | None = None
    evaluated: int = 0
    pending_logprobs: list[TokenLogprob] = field(default_factory=list)
    hidden: npt.NDArray[np.float32] | None = None

    @property
    def needs_all_outputs(self) -> bool:
        """Whether every token of the prompt must be evaluated, and have its output."""
        return self.prompt_logprobs or self.embeds


LlamaJob = Job[LlamaGeneration]
