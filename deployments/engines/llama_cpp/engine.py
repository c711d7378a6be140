"""The llama.cpp engine: many requests at once on one GGUF model, through llama-cpp-python's low-level interface.

A request passes three stages: `LlamaPreparer` checks it and makes tokens of it, `DecodeLoop` generates in its own
thread, and an `Answer` renders what arrives as OpenAI bytes. This module only joins them; it owns the model's life and
knows nothing of leases. Structured output, tools and stop strings come from `deployments.engines.chat`.

Greedy answers on a CPU with flash attention do not depend on what else runs, up to 256 tokens of context: the kernels
give bit-identical scores for a sequence, whatever shares its batch, as long as no prompt is evaluated in pieces of 64
tokens or more (see `CPU_PREFILL_CHUNK`). Beyond that, ggml splits a lone sequence's cache over its threads, but not a
batch's, and the sums round differently. Without flash attention, batches round differently from the start.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple

from cluster.errors import BackendUnavailable, ModelUnavailable
from deployments.engines.chat.answer import Answer, decoded
from deployments.engines.chat.generation import Mailbox
from deployments.engines.chat.prepare import Prepared
from deployments.engines.chat.template import ChatTemplate, choose_template
from deployments.engines.chat.tokens import tokens_body
from deployments.engines.chat.utf8 import TextAssembler
from deployments.engines.llama_cpp.conversations import Conversations
from deployments.engines.llama_cpp.embeddings import EmbeddingAnswer
from deployments.engines.llama_cpp.library import load_library
from deployments.engines.llama_cpp.loop import DecodeLoop
from deployments.engines.llama_cpp.memory import DEFAULT_BATCH
from deployments.engines.llama_cpp.prepare import LlamaPreparer
from deployments.engines.llama_cpp.runtime import FLASH_ATTENTION, KV_TYPES, Runtime, RuntimeOptions
from deployments.engines.llama_cpp.sampling import Grammar
from deployments.engines.llama_cpp.sequence import LlamaGeneration, LlamaJob
from deployments.engines.load_meter import LoadMeter
from deployments.engines.protocol import EVENT_STREAM, JSON, Call, EngineInfo, Progress, Reply, Saving, once
from deployments.kv_store.places import Places
from deployments.kv_store.store import KvStore
from deployments.schemas import DETOKENIZE, EMBEDDINGS, PATHS, TOKENIZE
from deployments.weights import resolve_weights

#: Prompt tokens that one step may evaluate beside the running streams: bounded, so that a long prompt does not stall
#: them; larger chunks gain little on a CPU (docs/measurements.md). 63 and not 64, because ggml's flash attention
#: changes to a tiled kernel, with other rounding, at 64 rows.
CPU_PREFILL_CHUNK = 63
GPU_PREFILL_CHUNK = 512
#: A request with more characters than this is prepared in a thread, since tokenizing it would hold up the event loop.
INLINE_CHARACTERS = 20_000


class Loaded(NamedTuple):
    """What a load gives; `memory_mib` is what it was seen to take."""

    runtime: Runtime
    template: ChatTemplate | None
    memory_mib: int
    conversations: Conversations | None


class LlamaCppEngine:
    """Implements `Engine` and `Remembering`. `slots` sequences share one context; each has `n_ctx` tokens of its own.

    `n_ctx` None takes the model's own context, at most 8192, halved until the KV cache is no larger than the weights
    or 1 GiB. `n_threads` None takes every core this process may use. `flash_attn` "auto" lets llama.cpp choose; on a
    CPU that is "on". `lora` are adapters with their scales, named as in the configuration; `tensor_split` are the
    shares of the devices.
    """

    def __init__(
        self,
        model_path: str,
        *,
        model_id: str,
        slots: int,
        n_ctx: int | None = None,
        n_threads: int | None = None,
        n_gpu_layers: int = -1,
        flash_attn: str = "auto",
        type_k: str | None = None,
        type_v: str | None = None,
        n_batch: int = DEFAULT_BATCH,
        n_ubatch: int | None = None,
        prefill_chunk: int | None = None,
        lora: tuple[tuple[str, float], ...] = (),
        tensor_split: tuple[float, ...] = (),
        prompt_format: str | None = None,
        enable_thinking: bool | None = None,
    ) -> None:
        if flash_attn not in FLASH_ATTENTION:
            raise ModelUnavailable(f"flash_attn must be one of {', '.join(FLASH_ATTENTION)}, not {flash_attn!r}")
        for kind in (type_k, type_v):
            if kind is not None and kind not in KV_TYPES:
                raise ModelUnavailable(f"type_k and type_v must be one of {', '.join(KV_TYPES)}, not {kind!r}")
        self._options = RuntimeOptions(
            model_path=model_path,
            slots=slots,
            n_ctx=n_ctx,
            n_threads=n_threads or len(os.sched_getaffinity(0)),
            n_gpu_layers=n_gpu_layers,
            flash_attn=flash_attn,
            type_k=type_k,
            type_v=type_v,
            n_batch=n_batch,
            n_ubatch=n_ubatch or n_batch,
            lora=lora,
            tensor_split=tensor_split,
        )
        self._model_id = model_id
        self._prompt_format = prompt_format
        self._enable_thinking = enable_thinking
        self._prefill_chunk = prefill_chunk
        self._runtime: Runtime | None = None
        self._memory_mib: int | None = None
        self._loop: DecodeLoop | None = None
        self._preparer: LlamaPreparer | None = None
        self._preparing: set[asyncio.Future[Any]] = set()
        self._store: KvStore | None = None
        self._conversations: Conversations | None = None

    def remember_in(self, places: Mapping[str, Any]) -> None:
        self._store = KvStore(Places.of(places))

    async def load(self, progress: Progress) -> None:
        """Load the model in a thread. Raises `ModelUnavailable` and leaves nothing behind."""
        # A thread of its own, which ends with the load. OpenMP keeps a team of threads for every thread that has
        # evaluated something, and when all of them are more than the cores, none of them waits awake any more at the
        # hundreds of barriers of a step, which then takes three times as long (docs/measurements.md).
        thread = ThreadPoolExecutor(1)
        loading = asyncio.get_running_loop().run_in_executor(thread, self._load, progress)
        thread.shutdown(wait=False)
        try:
            runtime, template, memory_mib, conversations = await asyncio.shield(loading)
        except asyncio.CancelledError:
            loading.add_done_callback(_close_loaded)
            raise
        chunk = self._prefill_chunk or (GPU_PREFILL_CHUNK if runtime.offloads else CPU_PREFILL_CHUNK)
        self._runtime = runtime
        self._memory_mib = memory_mib
        self._conversations = conversations
        self._preparer = LlamaPreparer(runtime, template, enable_thinking=self._enable_thinking)
        self._loop = DecodeLoop(runtime, self._options.slots, chunk)
        self._loop.start()

    def info(self) -> EngineInfo:
        runtime = self._runtime
        if runtime is None:
            return EngineInfo(paths=PATHS, format="gguf")
        return EngineInfo(context_length=runtime.n_ctx, paths=PATHS, format="gguf", memory_mib=self._memory_mib)

    async def call(self, call: Call) -> Reply:
        loop = self._loop
        if loop is None:
            raise BackendUnavailable("the model is not loaded")
        if call.path in (TOKENIZE, DETOKENIZE):
            return await self._tokens(call)
        answer = EmbeddingAnswer(call, self._model_id) if call.path == EMBEDDINGS else Answer(call, self._model_id)
        job = LlamaJob(Mailbox(loop.wake), max(1, call.slots))
        prepared = await self._prepare(call, job)
        if self._conversations is not None:
            await self._conversations.recall(list(job.pending), loop)
        answer.begin(prepared, list(job.pending), job.mailbox)
        if loop.stopping:
            raise BackendUnavailable("the model is being unloaded")
        parts = answer.stream() if call.stream and isinstance(answer, Answer) else answer.whole()
        chunks = decoded(loop, job, answer, parts)
        return Reply(200, dict(EVENT_STREAM if call.stream else JSON), chunks, answer.report)

    async def save(self) -> Saving:
        loop, conversations = self._loop, self._conversations
        if loop is None or conversations is None:
            return Saving(0, 0, 0.0)
        await asyncio.to_thread(loop.stop)
        return await asyncio.to_thread(conversations.save, loop.slots)

    async def unload(self) -> None:
        """Stop the loop and free the model; running calls fail with `BackendUnavailable`. Idempotent."""
        loop, runtime = self._loop, self._runtime
        self._loop = self._runtime = self._preparer = self._conversations = None
        if loop is not None:
            await asyncio.to_thread(loop.stop)
        if self._preparing:
            # A request that is being prepared still reads the vocabulary; it will find the loop stopped.
            await asyncio.wait(self._preparing)
        if runtime is not None:
            await asyncio.to_thread(runtime.close)

    async def _tokens(self, call: Call) -> Reply:
        """What a text is in tokens, or the reverse. In a thread, since a large text takes its time."""
        preparer = self._preparer
        assert preparer is not None, "a loop has a preparer"
        work = asyncio.ensure_future(asyncio.to_thread(tokens_body, preparer, call))
        self._preparing.add(work)
        work.add_done_callback(self._preparing.discard)
        return Reply(200, dict(JSON), once(await asyncio.shield(work)))

    async def _prepare(self, call: Call, job: LlamaJob) -> Prepared:
        """Check the call and give the job its sequences."""
        runtime, preparer = self._runtime, self._preparer
        if runtime is None or preparer is None:
            raise BackendUnavailable("the model is not loaded")

        def prepare() -> Prepared:
            prepared = preparer.prepare(call)
            job.pending.extend(_generations(prepared, runtime, job))
            return prepared

        if not _is_large(call.json):
            return prepare()
        # Shielded, since the thread outlives a cancelled request and `unload` must know of it.
        task = asyncio.ensure_future(asyncio.to_thread(prepare))
        self._preparing.add(task)
        task.add_done_callback(self._preparing.discard)
        return await asyncio.shield(task)

    def _load(self, progress: Progress) -> Loaded:
        """Load the model, and see how much memory that took. Blocks; in the thread that evaluates the first token.

        The chat template is compiled while the context is made: most of the former is Python, the latter is the
        kernel's zeroing of pages.
        """
        options = self._options
        if options.lora:
            options = replace(options, lora=tuple((resolve_weights(path), scale) for path, scale in options.lora))
        on_gpu = options.n_gpu_layers != 0 and bool(load_library().llama_supports_gpu_offload())
        meter = LoadMeter(on_gpu=on_gpu)
        runtime = Runtime.open(options, progress)
        try:
            with ThreadPoolExecutor(1) as aside:
                template = aside.submit(self._make_template, runtime)
                runtime.start()
            # Never less than weights and cache: mapped weights that the system has dropped from RAM again will be back.
            floor = runtime.memory_bytes >> 20
            # Some layers on the device, some on the host: then what the device holds is less than the whole, and true.
            partly = runtime.offloads and options.n_gpu_layers > 0
            grown = meter.grown_mib()
            memory_mib = floor if grown is None else grown if partly else max(grown, floor)
            conversations = None
            if self._store is not None and runtime.can_cut:
                conversations = Conversations(self._store, runtime, options)
            return Loaded(runtime, template.result(), memory_mib, conversations)
        except BaseException:
            runtime.close()
            raise

    def _make_template(self, runtime: Runtime) -> ChatTemplate | None:
        source = choose_template(self._prompt_format, runtime.metadata("tokenizer.chat_template"))
        if source is None:
            return None
        return ChatTemplate(source, bos_token=runtime.bos_text(), eos_token=runtime.eos_text())


def _close_loaded(loading: asyncio.Future[Loaded]) -> None:
    """Free a model whose load nobody waits for any more."""
    if not loading.cancelled() and loading.exception() is None:
        loading.result().runtime.close()


def _generations(prepared: Prepared, runtime: Runtime, job: LlamaJob) -> list[LlamaGeneration]:
    """One generation for each choice of each prompt, in the order of their indexes."""
    options = prepared.options
    grammar = None if prepared.grammar is None else Grammar(runtime, prepared.grammar)
    generations: list[LlamaGeneration] = []
    for prompt, limit in zip(prepared.prompts, prepared.limits, strict=True):
        for copy in range(options.n):
            generations.append(
                LlamaGeneration(
                    index=len(generations),
                    job=job,
                    prompt=prompt,
                    limit=limit,
                    sampling=options.sampling.for_copy(copy),
                    grammar=grammar,
                    assembler=TextAssembler(options.stops),
                    top_logprobs=options.top_logprobs,
                    prompt_logprobs=prepared.echo and options.top_logprobs is not None,
                    embeds=prepared.embeds,
                    ignore_eos=options.ignore_eos,
                    special=prepared.special,
                    first_piece=runtime.piece(prompt[0], special=True),
                )
            )
    return generations


def _is_large(body: dict[str, Any]) -> bool:
    """Whether preparing the request could hold up the event loop: a long text, or a grammar to compile."""
    if body.get("response_format") or body.get("tools") or body.get("grammar"):
        return True
    room = INLINE_CHARACTERS
    texts: list[Any] = [body.get("prompt"), body.get("messages"), body.get("input")]
    while texts and room >= 0:
        value = texts.pop()
        if isinstance(value, str):
            room -= len(value)
        elif isinstance(value, dict):
            texts.extend(value.values())
        elif isinstance(value, list):
            room -= len(value)
            texts.extend(value[:INLINE_CHARACTERS])
    return room < 0
