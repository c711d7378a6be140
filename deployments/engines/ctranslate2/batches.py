"""Which sequences are decoded together, and what becomes of each of them.

CTranslate2 decodes a batch from its beginning to its end: nothing joins it later, and all of it is decoded in one way.
So sequences that come within a moment of each other, ask for the same and have prompts of about one length make a
batch; there are as many workers as slots, on the same weights, so that no sequence ever waits for another's batch to
end. One that is over or cancelled leaves its batch at its next token.

A reader that falls behind cannot hold up its own sequence without holding up the whole batch; what is unread is
bounded by the context.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from cluster.errors import BackendUnavailable
from deployments.engines.chat.generation import Delta, Generation, Job
from deployments.engines.ctranslate2.prepare import Ct2Vocabulary, Decoding

logger = logging.getLogger("slotpool.ctranslate2")

#: How long a sequence waits for others to be decoded with, in seconds.
GATHER_S = 0.005
#: Prompts of one batch differ by this many tokens at most: what a longer one has beyond the shortest is evaluated token
#: by token.
SPREAD = 16


@dataclass(slots=True, eq=False)
class Ct2Job(Job[Generation]):
    """All sequences of one call, and how they are decoded."""

    decoding: Decoding = field(default_factory=Decoding)


class Batches:
    """The sequences of one loaded model. Its methods belong on one event loop."""

    def __init__(self, generator: Any, vocabulary: Ct2Vocabulary, ends: list[int], workers: int) -> None:
        self._generator, self._vocabulary = generator, vocabulary
        self._ends, self._end_set = ends, frozenset(ends)
        self._workers = workers
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="ct2")
        self._waiting: deque[tuple[Ct2Job, Generation]] = deque()
        self._running: set[asyncio.Task[None]] = set()
        self._generations: set[Generation] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._is_stopping = False

    def submit(self, job: Ct2Job) -> None:
        """Queue the sequences of a call, as many at a time as its width. Raises `BackendUnavailable` when stopping."""
        if self._is_stopping:
            raise BackendUnavailable("the model is being unloaded")
        for _ in range(min(job.width, len(job.pending))):
            self._waiting.append((job, job.pending.popleft()))
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(GATHER_S, self._dispatch)

    def cancel(self, job: Ct2Job) -> None:
        """Its sequences end at their next token. Harmless when it has ended."""
        job.cancelled = True
        job.pending.clear()

    async def stop(self) -> None:
        """Fail all that runs or waits, and wait until the workers have ended. Idempotent."""
        self._is_stopping = True
        for generation in [*self._generations, *(generation for _, generation in self._waiting)]:
            self._fail(generation, "the model was unloaded")
        self._waiting.clear()
        if self._running:
            await asyncio.wait(self._running)
        self._threads.shutdown(wait=False)

    # --- on the event loop

    def _dispatch(self) -> None:
        self._timer = None
        while self._waiting and len(self._running) < self._workers:
            job, batch = self._next_batch()
            if batch:
                task = asyncio.create_task(self._run(job.decoding, batch))
                self._running.add(task)
                task.add_done_callback(self._ended)

    def _next_batch(self) -> tuple[Ct2Job, list[Generation]]:
        """The oldest sequence, and those that can be decoded with it; none of one that was cancelled."""
        first, oldest = self._waiting[0]
        batch: list[Generation] = []
        left: deque[tuple[Ct2Job, Generation]] = deque()
        for job, generation in self._waiting:
            is_alike = abs(len(generation.prompt) - len(oldest.prompt)) <= SPREAD
            if job.cancelled:
                continue
            if job.decoding == first.decoding and is_alike:
                batch.append(generation)
            else:
                left.append((job, generation))
        self._waiting = left
        return first, batch

    async def _run(self, decoding: Decoding, batch: list[Generation]) -> None:
        for generation in batch:
            generation.started_at = time.perf_counter()
        self._generations.update(batch)
        try:
            work = asyncio.get_running_loop().run_in_executor(self._threads, self._decode, decoding, batch)
            await asyncio.shield(work)
        except Exception:
            logger.exception("a batch failed")
            for generation in batch:
                self._fail(generation, "the engine failed to decode")
        finally:
            self._generations.difference_update(batch)
            for generation in batch:
                job = generation.job
                if isinstance(job, Ct2Job) and job.pending and not job.cancelled and not self._is_stopping:
                    self._waiting.append((job, job.pending.popleft()))

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._dispatch()

    def _fail(self, generation: Generation, why: str) -> None:
        if not generation.ended_at:
            generation.ended_at = time.perf_counter()
            generation.job.mailbox.put(Delta(generation.index, error=BackendUnavailable(why)))

    # --- in a worker's thread

    def _decode(self, decoding: Decoding, batch: list[Generation]) -> None:
        limit = max(generation.limit for generation in batch)
        streams = [_Sequence(generation, self._vocabulary, self._end_set) for generation in batch]
        prompts = [self._vocabulary.names(generation.prompt) for generation in batch]
        steps = {} if decoding.beam_size > 1 else {"callback": lambda step: streams[step.batch_id].take(step.token_id)}
        if limit:
            results = self._generator.generate_batch(
                prompts,
                beam_size=decoding.beam_size,
                max_length=limit,
                # An end-of-sequence token that is to be ignored is not chosen before this length.
                min_length=limit if decoding.ignore_eos else 0,
                sampling_topk=decoding.top_k,
                sampling_topp=decoding.top_p,
                sampling_temperature=decoding.temperature,
                repetition_penalty=decoding.repetition_penalty,
                end_token=self._ends,
                return_end_token=True,
                include_prompt_in_result=False,
                **steps,
            )
            if decoding.beam_size > 1:
                for stream, result in zip(streams, results, strict=True):
                    for token in result.sequences_ids[0]:
                        if stream.take(token):
                            break
        for stream in streams:
            stream.finish("length")


class _Sequence:
    """One sequence of a batch: it makes text of the tokens, and says when it has ended."""

    def __init__(self, generation: Generation, vocabulary: Ct2Vocabulary, ends: frozenset[int]) -> None:
        from tokenizers.decoders import DecodeStream

        self._generation, self._tokenizer, self._ends = generation, vocabulary.tokenizer, ends
        self._text = DecodeStream(skip_special_tokens=not generation.special)

    def take(self, token: int) -> bool:
        """The next token; whether the sequence is over."""
        generation = self._generation
        if generation.ended_at or generation.job.cancelled:
            return True
        if not generation.produced:
            generation.first_token_at = time.perf_counter()
        generation.produced += 1
        if token in self._ends and not generation.ignore_eos:
            return self.finish("stop")
        text = generation.assembler.push((self._text.step(self._tokenizer, token) or "").encode())
        if generation.assembler.stopped:
            return self.finish("stop", text)
        if generation.produced >= generation.limit:
            return self.finish("length", text)
        if text:
            self._say(Delta(generation.index, text))
        return False

    def finish(self, reason: str, text: str = "") -> bool:
        """The end, if it has not come before; True."""
        generation = self._generation
        if not generation.ended_at and not generation.job.cancelled:
            generation.ended_at = time.perf_counter()
            text += "" if generation.assembler.stopped else generation.assembler.finish()
            stop = generation.assembler.stopped_by
            self._say(Delta(generation.index, text, finish="stop" if stop else reason, stop=stop))
        return True

    def _say(self, delta: Delta) -> None:
        mailbox = self._generation.job.mailbox
        mailbox.loop.call_soon_threadsafe(mailbox.put, delta)
