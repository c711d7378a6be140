"""What the engine uses of ExLlamaV3's documented interface, without a GPU: a prompt is continued with the token after
its last one, one token of every job for each call of `iterate`.

Keyword arguments have the library's names (1.6.5); what it does not know is a `TypeError` here as there.
"""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import numpy as np

#: The words of the vocabulary, `w0 ` to `w98 `, and what is unknown.
WORDS = 100
#: `w50 ` ends an answer.
END = 50


class Job:
    def __init__(
        self,
        input_ids: Any,
        max_new_tokens: int | None = None,
        min_new_tokens: int = 0,
        sampler: Any = None,
        seed: int | None = None,
        stop_conditions: list[int] | None = None,
        decode_special_tokens: bool = False,
        return_logits: bool = False,
        filters: list[Any] | None = None,
        identifier: Any = None,
        max_rq_tokens: int | None = None,
    ) -> None:
        self.prompt = np.asarray(input_ids)[0].tolist()
        assert self.prompt
        self.options = SimpleNamespace(**{name: value for name, value in locals().items() if name != "self"})
        self.identifier = identifier
        self.made: list[int] = []


class Generator:
    """`library.generators` has all of them; a step waits for `library.go_on`."""

    def __init__(
        self, model: Any, cache: Any, tokenizer: Any, max_batch_size: int = 256, max_chunk_size: int = 2048
    ) -> None:
        self.library = model.library
        self.library.generators.append(self)
        self.cache = cache
        self.max_batch_size, self.max_chunk_size = max_batch_size, max_chunk_size
        self.jobs: list[Job] = []
        self.batches: list[int] = []
        self.started: set[int] = set()
        self.is_closed = False
        if self.library.no_generator:
            raise RuntimeError("CUDA error: device-side assert")

    def enqueue(self, job: Job) -> int:
        self.jobs.append(job)
        self.library.jobs.append(job)
        return len(self.jobs)

    def cancel(self, job: Job) -> None:
        if job in self.jobs:
            self.jobs.remove(job)
            self.library.cancelled.append(job)

    def close(self) -> None:
        self.is_closed = True

    def iterate(self) -> list[dict[str, Any]]:
        assert self.library.go_on.wait(10)
        if self.library.error is not None:
            error, self.library.error = self.library.error, None
            raise error
        active = self.jobs[: self.max_batch_size]
        self.batches.append(len(active))
        results: list[dict[str, Any]] = []
        for job in active:
            head = {"job": job, "serial": 1, "identifier": job.identifier}
            if id(job) not in self.started:
                self.started.add(id(job))
                results.append({**head, "stage": "started", "eos": False})
            if job.prompt[-1] == self.library.fails_at:
                self.jobs.remove(job)
                results.append({"job": job, "serial": 1, "stage": "error", "eos": True, "error": ValueError("bad")})
                continue
            results.append(self._streamed(job, head))
        return results

    def _streamed(self, job: Job, head: dict[str, Any]) -> dict[str, Any]:
        token = (job.prompt + job.made)[-1] + 1
        job.made.append(token)
        options = job.options
        is_end = token in (options.stop_conditions or ())
        is_full = len(job.made) >= options.max_new_tokens
        result = {**head, "stage": "streaming", "eos": is_end or is_full}
        if not is_end:
            result |= {"text": f"w{token} ", "token_ids": np.array([[token]])}
            if options.return_logits:
                # One more than the vocabulary has, as a padded one has.
                logits = np.full((1, 1, WORDS + 1), -10.0, np.float32)
                logits[0, 0, token], logits[0, 0, token + 1], logits[0, 0, WORDS] = 5.0, 3.0, 99.0
                result["logits"] = logits
        if result["eos"]:
            self.jobs.remove(job)
            reason = "stop_token" if is_end else "max_new_tokens"
            result |= {"eos_reason": reason, "new_tokens": len(job.made), "cached_tokens": 3}
        return result


class Model:
    def __init__(self, library: Any) -> None:
        self.library = library
        self.loaded_with: dict[str, Any] | None = None

    def load(self, max_chunk_size: int = 2048, tensor_p: bool = False, callback: Any = None) -> None:
        assert self.library.caches, "a cache must be there before its model is loaded"
        if self.library.load_error is not None:
            raise self.library.load_error
        self.loaded_with = {"max_chunk_size": max_chunk_size, "tensor_p": tensor_p}
        for done in (1, 2):
            callback(done, 2)

    def unload(self) -> None:
        self.loaded_with = None


class Filter:
    def __init__(
        self,
        tokenizer: Any,
        eos_after_completed: bool = False,
        json_schema: Any = None,
        lark_grammar: str | None = None,
        gbnf_grammar: str | None = None,
    ) -> None:
        assert eos_after_completed
        if json_schema is not None and json_schema.get("type") == "nonsense":
            raise ValueError("Invalid grammar: Invalid type: nonsense")
        self.given = {"json_schema": json_schema, "lark_grammar": lark_grammar, "gbnf_grammar": gbnf_grammar}


class Library:
    """Stands for the module `exllamav3`."""

    Job, LLGuidanceFilter, Generator = Job, Filter, Generator
    CacheLayer_quant = "quantised"

    def __init__(self) -> None:
        self.generators: list[Generator] = []
        self.jobs: list[Job] = []
        self.cancelled: list[Job] = []
        self.caches: list[dict[str, Any]] = []
        self.error: Exception | None = None
        self.load_error: Exception | None = None
        self.fails_at = -1
        self.no_generator = False
        self.go_on = threading.Event()
        self.go_on.set()
        self.model = Model(self)
        config = SimpleNamespace(max_position_embeddings=1000, eos_token_id_list=[END])
        self.Config = SimpleNamespace(from_directory=lambda directory: config)
        self.Model = SimpleNamespace(from_config=lambda config: self.model)
        self.Tokenizer = SimpleNamespace(from_config=lambda config: "tokenizer")

    def Cache(
        self,
        model: Model,
        max_num_tokens: int,
        layer_type: Any = None,
        max_batch_size: int = 16,
        k_bits: int | None = None,
        v_bits: int | None = None,
    ) -> object:
        self.caches.append({"size": max_num_tokens, "layer": layer_type, "bits": (k_bits, v_bits)})
        return object()

    def ComboSampler(
        self,
        rep_p: float = 1.0,
        freq_p: float = 0.0,
        pres_p: float = 0.0,
        temperature: float = 1.0,
        min_p: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        logit_bias: dict[int, float] | None = None,
    ) -> dict[str, Any]:
        return {name: value for name, value in locals().items() if name != "self"}
