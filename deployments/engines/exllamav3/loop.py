"""The thread that drives the library's generator, which batches by itself: one call of `iterate` is one step of all.

It owns the generator and every job of it. The event loop hands work in with `submit` and `cancel`; what a step says
goes back with one call to the event loop. A reader that falls behind cannot hold up its own sequence; what is unread is
bounded by the context. A step that fails leaves the generator in an unknown state: what runs fails with it, and another
generator takes its place on the same weights and cache. Where that fails, too, the engine is at its end.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.errors import BackendUnavailable
from deployments.engines.chat.generation import Delta, Mailbox, deliver
from deployments.engines.chat.hf_vocabulary import HfVocabulary
from deployments.engines.chat.logprobs import TokenLogprob, top_logprobs
from deployments.engines.exllamav3.sequence import ExllamaGeneration, ExllamaJob, NativeJobs

logger = logging.getLogger("slotpool.exllamav3")

#: The library's reason for an end that is a length and no stop.
LENGTH = "max_new_tokens"


class GeneratorLoop:
    """Runs generations on one loaded model. `start` once, `stop` once; `submit` and `cancel` are thread-safe."""

    def __init__(self, make_generator: Callable[[], Any], jobs: NativeJobs, vocabulary: HfVocabulary) -> None:
        self._make_generator, self._jobs, self._vocabulary = make_generator, jobs, vocabulary
        self._generator: Any = make_generator()
        self._condition = threading.Condition()
        self._arrived: deque[ExllamaJob] = deque()
        self._running: list[ExllamaGeneration] = []
        self._deltas: list[tuple[Mailbox, Delta]] = []
        self._is_stopping = False
        self.has_failed = False
        self._thread = threading.Thread(target=self._run, name="exllamav3", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def stopping(self) -> bool:
        return self._is_stopping

    def submit(self, job: ExllamaJob) -> None:
        """Queue the sequences of a call. Raises `BackendUnavailable` when the engine is stopping."""
        with self._condition:
            if self._is_stopping:
                raise BackendUnavailable("the model is being unloaded")
            self._arrived.append(job)
            self._condition.notify()

    def cancel(self, job: ExllamaJob) -> None:
        """Its sequences end before the next step. Harmless when it has ended."""
        job.cancelled = True

    def stop(self) -> None:
        """End the thread after the step it is in; what still runs fails with `BackendUnavailable`. Blocks."""
        with self._condition:
            self._is_stopping = True
            self._condition.notify()
        if self._thread.is_alive():
            self._thread.join()

    # --- the thread

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                try:
                    self._step()
                except Exception:
                    logger.exception("a step of the generator failed")
                    self._fail_all("the engine failed in a step")
                    self._renew()
                self._deliver()
        except Exception:
            logger.exception("the generator cannot be replaced")
            self._is_stopping = self.has_failed = True
        finally:
            self._fail_all("the model was unloaded")
            self._deliver()
            self._generator.close()

    def _wait_for_work(self) -> bool:
        with self._condition:
            while not (self._is_stopping or self._arrived or self._running):
                self._condition.wait()
            arrived, self._arrived = self._arrived, deque()
        for job in arrived:
            for _ in range(min(job.width, len(job.pending))):
                self._start(job.pending.popleft())
        return not self._is_stopping

    def _step(self) -> None:
        for generation in [each for each in self._running if each.job.cancelled]:
            self._generator.cancel(generation.native)
            self._end(generation)
        if self._running:
            for result in self._generator.iterate():
                self._take(result["identifier"] if "identifier" in result else result["job"].identifier, result)

    def _start(self, generation: ExllamaGeneration) -> None:
        if generation.job.cancelled:
            return
        self._running.append(generation)
        if generation.limit <= 0:
            self._finish(generation, "length")
            return
        try:
            generation.native = self._jobs.make(generation)
            self._generator.enqueue(generation.native)
        except Exception:
            # The library asserts what it does not take.
            logger.exception("a request is not taken")
            self._say(generation, Delta(generation.index, error=BackendUnavailable("the engine refused the request")))
            self._end(generation)

    def _take(self, generation: ExllamaGeneration, result: dict[str, Any]) -> None:
        """One event of the generator."""
        if generation not in self._running:
            return
        match result["stage"]:
            case "started":
                generation.started_at = generation.started_at or time.perf_counter()
            case "error":
                logger.error("a sequence failed: %r", result.get("error"))
                error = BackendUnavailable("the engine failed to decode")
                self._say(generation, Delta(generation.index, error=error))
                self._end(generation)
            case "streaming":
                self._take_tokens(generation, result)

    def _take_tokens(self, generation: ExllamaGeneration, result: dict[str, Any]) -> None:
        tokens = _numbers(result.get("token_ids"))
        if (len(tokens) or result["eos"]) and not generation.first_token_at:
            generation.first_token_at = time.perf_counter()
        # What the library holds back is counted when it comes, or at the end, and so is the token that ends an answer.
        generation.produced = int(result["new_tokens"]) if result["eos"] else generation.produced + len(tokens)
        if result["eos"]:
            generation.reused = int(result.get("cached_tokens") or 0)
        delta = Delta(generation.index, generation.assembler.push(result.get("text", "").encode()))
        if generation.top_logprobs is not None and len(tokens):
            delta.logprobs = self._logprobs(generation.top_logprobs, tokens, result["logits"])
        if generation.assembler.stopped:
            if not result["eos"]:
                self._generator.cancel(generation.native)
            self._finish(generation, "stop", delta)
        elif result["eos"]:
            self._finish(generation, "length" if result.get("eos_reason") == LENGTH else "stop", delta)
        elif delta.text or delta.logprobs:
            self._say(generation, delta)

    def _logprobs(self, count: int, tokens: npt.NDArray[Any], logits: Any) -> list[TokenLogprob]:
        piece, size = self._vocabulary.piece, self._vocabulary.vocab_size
        found = []
        # The scores are as many as the padded vocabulary has.
        for token, row in zip(tokens, np.asarray(logits, dtype=np.float32)[0, :, :size], strict=True):
            logprob, top = top_logprobs(row, int(token), count)
            named = tuple((piece(other, special=True), value) for other, value in top)
            found.append(TokenLogprob(piece(int(token), special=True), logprob, named))
        return found

    # --- endings

    def _finish(self, generation: ExllamaGeneration, reason: str, delta: Delta | None = None) -> None:
        delta = delta or Delta(generation.index)
        if not generation.assembler.stopped:
            delta.text += generation.assembler.finish()
        delta.stop = generation.assembler.stopped_by
        delta.finish = "stop" if delta.stop else reason
        self._say(generation, delta)
        self._end(generation)

    def _end(self, generation: ExllamaGeneration) -> None:
        """The sequence is over; the next one of its job begins."""
        generation.ended_at = generation.ended_at or time.perf_counter()
        generation.native = None
        self._running.remove(generation)
        job = generation.job
        if job.pending and not job.cancelled and not self._is_stopping:
            self._start(job.pending.popleft())

    def _fail_all(self, why: str) -> None:
        pending = [generation for job in self._arrived for generation in job.pending]
        for generation in self._running:
            pending.extend(generation.job.pending)
            generation.job.pending.clear()
        failed = [*self._running, *pending]
        self._running.clear()
        self._arrived.clear()
        for generation in failed:
            generation.ended_at = generation.ended_at or time.perf_counter()
            self._say(generation, Delta(generation.index, error=BackendUnavailable(why)))

    def _renew(self) -> None:
        """Another generator, with nothing to do. The first one gives back what it holds."""
        self._generator.close()
        self._generator = self._make_generator()

    # --- hand-over

    def _say(self, generation: ExllamaGeneration, delta: Delta) -> None:
        generation.said += 1
        self._deltas.append((generation.job.mailbox, delta))

    def _deliver(self) -> None:
        deltas, self._deltas = self._deltas, []
        if deltas:
            deliver(deltas)


def _numbers(tensor: Any) -> npt.NDArray[Any]:
    """The tokens of a tensor of one row; none for None."""
    return np.zeros(0, np.int64) if tensor is None else np.asarray(tensor).reshape(-1)
