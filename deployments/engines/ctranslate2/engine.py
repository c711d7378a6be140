"""The CTranslate2 engine: converted generator models, behind the same chat, tokens and errors as the others.

It owns the model's life: loaded, asleep with its weights in the host's memory (the library's own `unload_model`), and
unloaded. `Ct2Preparer` checks a request, `Batches` decodes, and an `Answer` renders what comes.
"""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path
from typing import Any

from cluster import gpus
from cluster.config import Ct2Model
from cluster.errors import BackendUnavailable, ModelUnavailable
from deployments.engines.chat.answer import Answer, decoded
from deployments.engines.chat.generation import Generation, Mailbox
from deployments.engines.chat.prepare import Prepared
from deployments.engines.chat.template import ChatTemplate, choose_template
from deployments.engines.chat.tokens import tokens_body
from deployments.engines.chat.utf8 import TextAssembler
from deployments.engines.ctranslate2.batches import Batches, Ct2Job
from deployments.engines.ctranslate2.folder import Ct2Folder
from deployments.engines.ctranslate2.prepare import Ct2Preparer, Ct2Vocabulary, Decoding
from deployments.engines.load_meter import LoadMeter
from deployments.engines.protocol import EVENT_STREAM, JSON, Call, EngineInfo, Kept, Progress, Reply, once
from deployments.schemas import DETOKENIZE, EMBEDDINGS, PATHS, TOKENIZE

logger = logging.getLogger("slotpool.ctranslate2")


class Ct2Engine:
    """Implements `Engine` and `Sleeper` for the model in the folder at `path`."""

    def __init__(self, model_id: str, model: Ct2Model, path: str) -> None:
        self._id, self._model, self._path = model_id, model, Path(path)
        self._generator: Any = None
        self._batches: Batches | None = None
        self._preparer: Ct2Preparer | None = None
        self._weights_mib = 0
        self._info = EngineInfo(paths=PATHS - {EMBEDDINGS}, format=model.format)

    async def load(self, progress: Progress) -> None:
        """Load the model in a thread. Raises `ModelUnavailable`."""
        progress(0.0)
        try:
            await asyncio.to_thread(self._load)
        except (ValueError, RuntimeError, MemoryError, ImportError, OSError) as error:
            logger.warning("the model cannot be loaded", exc_info=True)
            raise ModelUnavailable(f"CTranslate2 cannot load {self._path.name}: {self._said(error)}") from None
        slots = self._model.target_inflight
        workers = self._model.engine_kwargs.inter_threads or slots
        vocabulary = self._vocabulary
        self._batches = Batches(self._generator, vocabulary, self._ends(vocabulary), workers)
        progress(1.0)

    def info(self) -> EngineInfo:
        return self._info

    async def call(self, call: Call) -> Reply:
        batches, preparer = self._batches, self._preparer
        if batches is None or preparer is None:
            raise BackendUnavailable("the model is not loaded")
        if call.path in (TOKENIZE, DETOKENIZE):
            return Reply(200, dict(JSON), once(await asyncio.to_thread(tokens_body, preparer, call)))
        answer = Answer(call, self._id)
        prepared = await asyncio.to_thread(preparer.prepare, call)
        job = Ct2Job(Mailbox(lambda: None), max(1, call.slots))
        job.decoding = Decoding.of(call.json, prepared.options, max(prepared.limits, default=0))
        job.pending.extend(_generations(prepared, job))
        answer.begin(prepared, list(job.pending), job.mailbox)
        chunks = decoded(batches, job, answer, answer.stream() if call.stream else answer.whole())
        return Reply(200, dict(EVENT_STREAM if call.stream else JSON), chunks, answer.report)

    async def sleep(self) -> Kept:
        await asyncio.to_thread(self._generator.unload_model, to_cpu=True)
        return Kept(self._weights_mib, gpus.held_mib(os.getpid()) or 0 if self._model.num_gpus else 0)

    async def wake(self, progress: Progress) -> None:
        try:
            await asyncio.to_thread(self._generator.load_model)
        except (ValueError, RuntimeError, MemoryError) as error:
            raise ModelUnavailable(f"CTranslate2 cannot wake {self._path.name}: {self._said(error)}") from None
        progress(1.0)

    async def unload(self) -> None:
        batches, self._batches = self._batches, None
        if batches is not None:
            await batches.stop()
            await asyncio.to_thread(self._generator.unload_model)
        self._generator = self._preparer = None

    def _load(self) -> None:
        """Blocks. In a process that serves one model, so the library's threads are all this model's."""
        import ctranslate2

        model, options = self._model, self._model.engine_kwargs
        folder = Ct2Folder(self._path)
        on_gpu = model.num_gpus > 0
        meter = LoadMeter(on_gpu=on_gpu)
        self._generator = ctranslate2.Generator(
            str(self._path),
            device="cuda" if on_gpu else "cpu",
            device_index=list(range(max(1, int(model.num_gpus)))) if on_gpu else 0,
            compute_type=model.compute_type,
            inter_threads=options.inter_threads or model.target_inflight,
            intra_threads=options.intra_threads or len(os.sched_getaffinity(0)),
        )
        tokenizer = folder.tokenizer
        n_ctx = options.n_ctx or folder.context_length
        vocabulary = Ct2Vocabulary(tokenizer, folder.bos, n_ctx)
        self._vocabulary = vocabulary
        self._folder, self._weights_mib = folder, folder.weights_mib
        source = choose_template(model.prompt_format, folder.chat_template)
        marks = {"bos_token": folder.bos, "eos_token": (folder.ends or [""])[0]}
        template = None if source is None else ChatTemplate(source, **marks)
        self._preparer = Ct2Preparer(vocabulary, template, enable_thinking=model.enable_thinking)
        grown = meter.grown_mib()
        self._info = EngineInfo(n_ctx, PATHS - {EMBEDDINGS}, model.format, max(grown or 0, self._weights_mib))

    def _ends(self, vocabulary: Ct2Vocabulary) -> list[int]:
        named = [vocabulary.id_of(name) for name in self._folder.ends]
        return list(dict.fromkeys([*(each for each in named if each is not None), *self._folder.end_ids]))

    def _said(self, error: Exception) -> str:
        """The library's own words, without the folder's path: clients may read them."""
        return str(error).replace(str(self._path), self._path.name)[:300] or type(error).__name__


def _generations(prepared: Prepared, job: Ct2Job) -> list[Generation]:
    """One generation for each choice of each prompt, in the order of their indexes."""
    return [
        Generation(
            index=number * prepared.options.n + copy,
            job=job,
            prompt=prompt,
            limit=limit,
            sampling=prepared.options.sampling,
            assembler=TextAssembler(prepared.options.stops),
            ignore_eos=prepared.options.ignore_eos,
            special=prepared.special,
        )
        for number, (prompt, limit) in enumerate(zip(prepared.prompts, prepared.limits, strict=True))
        for copy in range(prepared.options.n)
    ]
