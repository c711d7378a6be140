"""How one sequence chooses its next token: a chain of llama.cpp samplers, and a grammar beside it.

Greedy without any bias never builds a chain: numpy's argmax over the scores is several times faster than
`llama_sampler_sample`, which first copies every score into a candidate list (docs/measurements.md).

A grammar is not part of the chain. Walking it over a whole vocabulary takes milliseconds, so the chain chooses freely
first and the grammar looks at that single token; only when it refuses are all candidates filtered and the choice made
again. That draws from the same distribution as filtering first: a permitted token t is chosen with probability
p(t) + (1 - p(permitted)) p(t) / p(permitted) = p(t) / p(permitted).
"""

from __future__ import annotations

import ctypes
import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np

from cluster.errors import InvalidRequest
from deployments.engines.chat.request import Sampling
from deployments.engines.llama_cpp.runtime import Logits, Runtime

#: llama.cpp's own default window for the repetition penalty.
REPEAT_WINDOW = 64
NO_TOKEN = -1


class Grammar:
    """A compiled grammar, from which each sequence gets a copy of its own.

    Compiling a large one takes as long as many decode steps, copying it a small part of that (docs/measurements.md):
    so it is compiled where the request is prepared, and copied when a sequence starts. Raises `InvalidRequest`.
    """

    def __init__(self, runtime: Runtime, text: str) -> None:
        self._lib, vocab = runtime.native
        self._compiled = self._lib.llama_sampler_init_grammar(vocab, text.encode(), b"root")
        if not self._compiled:
            raise InvalidRequest("the grammar of the requested format could not be compiled")

    def copy(self) -> Any:
        """A native sampler, which the caller must free."""
        return self._lib.llama_sampler_clone(self._compiled)

    def __del__(self) -> None:
        if self._compiled:
            self._lib.llama_sampler_free(self._compiled)


class Sampler:
    """The choice of tokens for one sequence. Used by the decode thread only; `close` frees the native parts."""

    def __init__(self, runtime: Runtime, sampling: Sampling, grammar: Grammar | None, prompt: Sequence[int]) -> None:
        self._chain: Any = None
        self._grammar: Any = None
        self._lib, self._vocab = runtime.native
        self._plain_greedy = sampling.greedy and not sampling.reshapes
        if grammar is not None:
            self._grammar = grammar.copy()
        if not self._plain_greedy:
            self._chain = self._build_chain(sampling, runtime.vocab_size, runtime.n_ctx, prompt)
        if not self._plain_greedy or self._grammar:
            # One candidate list for the life of the sequence; filling it is one numpy pass per token.
            self._candidates = np.zeros(runtime.vocab_size, _CANDIDATE)
            self._ids = np.arange(runtime.vocab_size, dtype=np.int32)

    def choose(self, logits: Logits) -> int:
        """The next token, already accepted into penalties and grammar; `NO_TOKEN` when the grammar permits none."""
        token = self._freely(logits)
        if self._grammar and not self._permitted(token):
            token = self._constrained(logits)
            if token == NO_TOKEN:
                return token
        if self._grammar:
            self._lib.llama_sampler_accept(self._grammar, token)
        if self._chain:
            self._lib.llama_sampler_accept(self._chain, token)
        return token

    def close(self) -> None:
        for part in (self._chain, self._grammar):
            if part:
                self._lib.llama_sampler_free(part)
        self._chain = self._grammar = None

    def _freely(self, logits: Logits) -> int:
        if self._plain_greedy:
            return int(logits.argmax())
        array = self._fill(logits)
        self._lib.llama_sampler_apply(self._chain, ctypes.byref(array))
        return int(array.data[array.selected].id)

    def _constrained(self, logits: Logits) -> int:
        array = self._fill(logits)
        self._lib.llama_sampler_apply(self._grammar, ctypes.byref(array))
        best = int(self._candidates["logit"].argmax())
        if self._candidates["logit"][best] == -np.inf:
            # Accepting a token that the grammar forbids would end the process: the C++ exception crosses into ctypes.
            return NO_TOKEN
        if self._chain:
            self._lib.llama_sampler_apply(self._chain, ctypes.byref(array))
            return int(array.data[array.selected].id)
        return int(self._candidates["id"][best])

    def _permitted(self, token: int) -> bool:
        single = (self._lib.llama_token_data * 1)()
        single[0].id, single[0].logit = token, 1.0
        array = self._lib.llama_token_data_array(single, 1, -1, False)
        self._lib.llama_sampler_apply(self._grammar, ctypes.byref(array))
        return bool(single[0].logit != -math.inf)

    def _fill(self, logits: Logits) -> Any:
        candidates = self._candidates
        candidates["id"] = self._ids
        candidates["logit"] = logits
        candidates["p"] = 0.0
        data = ctypes.cast(candidates.ctypes.data, ctypes.POINTER(self._lib.llama_token_data))
        return self._lib.llama_token_data_array(data, candidates.size, -1, False)

    def _build_chain(self, sampling: Sampling, vocab_size: int, window: int, prompt: Sequence[int]) -> Any:
        lib = self._lib
        chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        if sampling.logit_bias:
            bias = [(token, value) for token, value in sampling.logit_bias if token < vocab_size]
            entries = (lib.llama_logit_bias * len(bias))(*bias)
            lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_logit_bias(vocab_size, len(bias), entries))
        if sampling.repeat_penalty not in (0.0, 1.0):
            # The repetition penalty looks at the prompt too, the other two only at the answer, as the API documents.
            repeat = lib.llama_sampler_init_penalties(vocab_size, REPEAT_WINDOW, sampling.repeat_penalty, 0.0, 0.0)
            for token in prompt[-REPEAT_WINDOW:]:
                lib.llama_sampler_accept(repeat, token)
            lib.llama_sampler_chain_add(chain, repeat)
        if sampling.frequency_penalty or sampling.presence_penalty:
            penalties = (sampling.frequency_penalty, sampling.presence_penalty)
            lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_penalties(vocab_size, window, 1.0, *penalties))
        if sampling.greedy:
            lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_greedy())
            return chain
        if sampling.top_k:
            lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_top_k(sampling.top_k))
        if sampling.top_p < 1.0:
            lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_top_p(sampling.top_p, 1))
        if sampling.min_p > 0.0:
            lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_min_p(sampling.min_p, 1))
        lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_temp(sampling.temperature))
        # The C side reserves one value of 32 bits for "random"; a missing seed is drawn here instead.
        seed = random.getrandbits(31) if sampling.seed is None else sampling.seed & 0x7FFFFFFF
        lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_dist(seed))
        return chain


_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
