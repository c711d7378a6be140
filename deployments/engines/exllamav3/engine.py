"""ExLlamaV3: EXL3 weights on NVIDIA GPUs, many requests in one batch of the library's dynamic generator.

`ExllamaPreparer` checks a request, `GeneratorLoop` drives the library in a thread of its own, and an `Answer` renders
what comes. This module joins them, and owns the model's life.
"""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path
from typing import Any

from cluster.config import ExllamaModel
from cluster.errors import BackendUnavailable, ModelUnavailable
from deployments.engines.chat.answer import Answer, decoded
from deployments.engines.chat.generation import Mailbox
from deployments.engines.chat.hf_folder import HfFolder
from deployments.engines.chat.hf_vocabulary import HfVocabulary
from deployments.engines.chat.prepare import Prepared
from deployments.engines.chat.template import ChatTemplate, choose_template
from deployments.engines.chat.tokens import tokens_body
from deployments.engines.chat.utf8 import TextAssembler
from deployments.engines.exllamav3.loop import GeneratorLoop
from deployments.engines.exllamav3.memory import default_cache_size
from deployments.engines.exllamav3.prepare import ExllamaPreparer
from deployments.engines.exllamav3.sequence import ExllamaGeneration, ExllamaJob, NativeJobs
from deployments.engines.protocol import EVENT_STREAM, JSON, Call, EngineInfo, Progress, Reply, once
from deployments.host_memory import tree_device_mib
from deployments.schemas import DETOKENIZE, EMBEDDINGS, PATHS, TOKENIZE

logger = logging.getLogger("slotpool.exllamav3")

#: Tokens of a prompt that one step evaluates, by the library's own choice.
CHUNK = 2048
#: How often it is seen whether the generator has failed, in seconds.
WATCH_S = 0.25


class ExllamaEngine:
    """Implements `Engine` and `RunsProcess` for the model in the folder at `path`: without its generator the process
    can answer nothing, and ends."""

    def __init__(self, model_id: str, model: ExllamaModel, path: str) -> None:
        self._id, self._model, self._path = model_id, model, Path(path)
        self._native: Any = None
        self._loop: GeneratorLoop | None = None
        self._preparer: ExllamaPreparer | None = None
        self._info = EngineInfo(paths=PATHS - {EMBEDDINGS}, format=model.format)

    async def load(self, progress: Progress) -> None:
        """Load the model in a thread. Raises `ModelUnavailable`."""
        if not self._model.num_gpus:
            raise ModelUnavailable("ExLlamaV3 runs on NVIDIA GPUs only: this model needs num_gpus")
        progress(0.0)
        try:
            await asyncio.to_thread(self._load, progress)
        except ModelUnavailable:
            raise
        except ModuleNotFoundError as error:
            missing = f"ExLlamaV3 is not installed where its engine runs ({error.name})"
            raise ModelUnavailable(f"{missing}: pip install 'slotpool[exllamav3]'") from None
        except Exception as error:
            logger.exception("ExLlamaV3 did not load %s", self._id)
            raise ModelUnavailable(f"ExLlamaV3 cannot load {self._path.name}: {self._said(error)}") from None
        progress(1.0)

    def info(self) -> EngineInfo:
        return self._info

    async def call(self, call: Call) -> Reply:
        loop, preparer = self._loop, self._preparer
        if loop is None or preparer is None:
            raise BackendUnavailable("the model is not loaded")
        if call.path in (TOKENIZE, DETOKENIZE):
            return Reply(200, dict(JSON), once(await asyncio.to_thread(tokens_body, preparer, call)))
        answer = Answer(call, self._id)
        prepared = await asyncio.to_thread(preparer.prepare, call)
        job = ExllamaJob(Mailbox(lambda: None), max(1, call.slots))
        job.pending.extend(_generations(prepared, job))
        answer.begin(prepared, list(job.pending), job.mailbox)
        if loop.stopping:
            raise BackendUnavailable("the model is being unloaded")
        chunks = decoded(loop, job, answer, answer.stream() if call.stream else answer.whole())
        return Reply(200, dict(EVENT_STREAM if call.stream else JSON), chunks, answer.report)

    async def died(self) -> str:
        """Wait until the generator has failed, and could not be replaced."""
        loop = self._loop
        assert loop is not None, "it was loaded"
        while not loop.has_failed:  # noqa: ASYNC110 - a thread of its own tells only who asks
            await asyncio.sleep(WATCH_S)
        return "ExLlamaV3's generator has failed"

    async def answers(self) -> bool:
        return self._loop is not None and not self._loop.has_failed

    async def stop(self) -> None:
        """Nothing of it needs an end of its own: with this process it is gone."""

    async def unload(self) -> None:
        loop, native = self._loop, self._native
        self._loop = self._preparer = self._native = None
        if loop is not None:
            await asyncio.to_thread(loop.stop)
        if native is not None:
            await asyncio.to_thread(native.unload)

    def _load(self, progress: Progress) -> None:
        """Blocks. The library is imported here, and nowhere else."""
        import exllamav3
        import torch

        if not torch.cuda.is_available():
            raise ModelUnavailable("ExLlamaV3 runs on NVIDIA GPUs only, and PyTorch finds none")
        model, options = self._model, self._model.engine_kwargs
        folder = HfFolder(self._path)
        config = exllamav3.Config.from_directory(str(self._path))
        size = model.exllama_cache_size or default_cache_size(config.max_position_embeddings)
        native = exllamav3.Model.from_config(config)
        bits = model.cache_bits
        quantised: dict[str, Any] = {}
        if bits is not None:
            quantised = {"layer_type": exllamav3.CacheLayer_quant, "k_bits": bits[0], "v_bits": bits[1]}
        # Before the weights: to load them allocates the cache of each layer beside them.
        cache = exllamav3.Cache(native, size, max_batch_size=model.target_inflight, **quantised)
        tokenizer = exllamav3.Tokenizer.from_config(config)
        chunk = options.max_chunk_size or CHUNK
        native.load(
            max_chunk_size=chunk,
            tensor_p=options.tensor_parallel,
            callback=lambda done, of: progress(done / max(1, of)),
        )
        # One token of the cache is the library's own.
        context = min(options.n_ctx or config.max_position_embeddings, size - 1)
        vocabulary = HfVocabulary(folder.tokenizer, folder.bos, context)
        jobs = NativeJobs(
            exllamav3, torch.tensor, tokenizer, _ends(folder, vocabulary, config), model.exllama_max_rq_tokens
        )
        source = choose_template(model.prompt_format, folder.chat_template)
        marks = {"bos_token": folder.bos, "eos_token": (folder.ends or [""])[0]}
        template = None if source is None else ChatTemplate(source, **marks)
        self._preparer = ExllamaPreparer(vocabulary, template, jobs.filter, enable_thinking=model.enable_thinking)
        batch = {"max_batch_size": model.target_inflight, "max_chunk_size": chunk}
        self._loop = GeneratorLoop(lambda: exllamav3.Generator(native, cache, tokenizer, **batch), jobs, vocabulary)
        self._native = native
        self._info = EngineInfo(context, PATHS - {EMBEDDINGS}, model.format, tree_device_mib(os.getpid()))
        self._loop.start()

    def _said(self, error: Exception) -> str:
        """The library's own words in one line, without the folder's path: clients may read them."""
        lines = str(error).replace(str(self._path), self._path.name).strip().splitlines()
        return lines[0][:300] if lines else type(error).__name__


def _ends(folder: HfFolder, vocabulary: HfVocabulary, config: Any) -> list[int]:
    """The tokens that end an answer."""
    named = [vocabulary.id_of(name) for name in folder.ends]
    known = [*(each for each in named if each is not None), *folder.end_ids, *config.eos_token_id_list]
    return list(dict.fromkeys(known))


def _generations(prepared: Prepared, job: ExllamaJob) -> list[ExllamaGeneration]:
    """One generation for each choice of each prompt, in the order of their indexes."""
    options = prepared.options
    return [
        ExllamaGeneration(
            index=number * options.n + copy,
            job=job,
            prompt=prompt,
            limit=limit,
            sampling=options.sampling.for_copy(copy),
            assembler=TextAssembler(options.stops),
            top_logprobs=options.top_logprobs,
            ignore_eos=options.ignore_eos,
            special=prepared.special,
            grammar=prepared.grammar,
        )
        for number, (prompt, limit) in enumerate(zip(prepared.prompts, prepared.limits, strict=True))
        for copy in range(options.n)
    ]
