"""The decode loop: one thread that advances every running sequence by one token per step (continuous batching).

It owns the slots (the KV cache's sequences) and all native calls. A step builds one batch: the next token of every
running sequence, and a bounded chunk of the prompts that wait, so that a long prompt never stalls the streams. The
event loop hands work in with `submit` and `cancel`; tokens go back with one `call_soon_threadsafe` per step for all
sequences together. A sequence whose reader is too far behind is left out of the steps until it was read; its slot stays
its own. A loop that has nothing to do waits on a condition.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence

from cluster.errors import BackendUnavailable, PoolError
from deployments.engines.chat.generation import Delta, Mailbox, deliver
from deployments.engines.chat.logprobs import TokenLogprob, top_logprobs
from deployments.engines.llama_cpp.prefix import Prefixes, Slot, common_prefix
from deployments.engines.llama_cpp.runtime import Logits, Runtime
from deployments.engines.llama_cpp.sampling import NO_TOKEN, Sampler
from deployments.engines.llama_cpp.sequence import LlamaGeneration, LlamaJob
from deployments.engines.llama_cpp.team import Team

log = logging.getLogger(__name__)

#: How much nicer the threads that decode are than the rest of the process: where all cores decode, tokens on their way
#: out to a client go before the computing of the next ones (docs/measurements.md). Relative, since Ray's processes have
#: a niceness of their own, below which only root may go.
COMPUTE_NICE = 5


class DecodeLoop:
    """Runs generations on `slots` sequences of a runtime. `start` once, `stop` once; the rest is thread-safe."""

    def __init__(self, runtime: Runtime, slots: int, prefill_chunk: int) -> None:
        self._runtime = runtime
        self._slots = [Slot(number) for number in range(slots)]
        self._prefill_chunk = prefill_chunk
        self._condition = threading.Condition()
        self._arrived: deque[LlamaJob] = deque()
        self._stopping = False
        self._waiting: deque[LlamaGeneration] = deque()
        #: Slots in the order in which their prompts were admitted, the oldest first.
        self._prefilling: list[Slot] = []
        self._deltas: list[tuple[Mailbox, Delta]] = []
        self._thread = threading.Thread(target=self._run, name="llama-decode", daemon=True)
        self._team = Team(runtime.threads)
        self._prefixes = Prefixes(runtime, self._slots)
        self.steps = 0

    def start(self) -> None:
        self._thread.start()

    @property
    def stopping(self) -> bool:
        return self._stopping

    def submit(self, job: LlamaJob) -> None:
        """Queue the sequences of a call. Raises `BackendUnavailable` when the engine is stopping."""
        with self._condition:
            if self._stopping:
                raise BackendUnavailable("the model is being unloaded")
            self._arrived.append(job)
            self._condition.notify()

    def cancel(self, job: LlamaJob) -> None:
        """Free the job's slots before the next step. Harmless when it has ended."""
        job.cancelled = True
        self.wake()

    def wake(self) -> None:
        """Have the thread look again at what it can do."""
        with self._condition:
            self._condition.notify()

    def stop(self) -> None:
        """End the thread after the step it is in; what still runs fails with `BackendUnavailable`. Blocks."""
        with self._condition:
            self._stopping = True
            self._condition.notify()
        if self._thread.is_alive():
            self._thread.join()

    def held(self, prompt: list[int]) -> int:
        """How much of a prompt is held in some slot: a snapshot, which the next step may change."""
        return self._prefixes.held(prompt)

    @property
    def gain(self) -> int:
        """How many more tokens of a prompt must be had from elsewhere than a slot holds, for that to pay."""
        return self._prefixes.gain

    @property
    def slots(self) -> Sequence[Slot]:
        """The slots with what they hold. Steady once the loop is stopped."""
        return self._slots

    @property
    def idle(self) -> bool:
        """Whether no sequence runs or waits. A snapshot, for tests and status only."""
        return not (self._arrived or self._waiting or any(slot.generation for slot in self._slots))

    # --- the thread

    def _run(self) -> None:
        if sys.platform == "linux":
            # There a niceness is a thread's own, and the library's threads inherit it from this one.
            thread = threading.get_native_id()
            nice = os.getpriority(os.PRIO_PROCESS, thread) + COMPUTE_NICE
            os.setpriority(os.PRIO_PROCESS, thread, min(19, nice))
        try:
            while self._wait_for_work():
                try:
                    self._step()
                except Exception:
                    log.exception("a decode step failed")
                    self._runtime.discard()
                    self._fail_running("the engine failed in a decode step")
                self._deliver()
        finally:
            self._fail_running("the model was unloaded")
            for generation in [*self._waiting, *(generation for job in self._arrived for generation in job.pending)]:
                self._say(generation, Delta(generation.index, error=BackendUnavailable("the model was unloaded")))
            self._deliver()

    def _wait_for_work(self) -> bool:
        with self._condition:
            while not (self._stopping or self._arrived or self._has_work()):
                self._condition.wait()
            for job in self._arrived:
                for _ in range(min(job.width, len(job.pending))):
                    self._waiting.append(job.pending.popleft())
            self._arrived.clear()
            return not self._stopping

    def _has_work(self) -> bool:
        """Whether a step would do anything. Sequences whose readers are behind only wait."""
        if self._prefilling or any(generation.job.cancelled for generation in self._waiting):
            return True
        for slot in self._slots:
            generation = slot.generation
            if generation is None:
                if self._waiting:
                    return True
            elif generation.job.cancelled or not generation.is_behind:
                return True
        return False

    def _step(self) -> None:
        self._reap()
        self._admit()
        rows = self._add_next_tokens()
        self._add_prompts(rows)
        if not self._runtime.batched:
            return
        embeds = any(slot.generation is not None and slot.generation.embeds for slot, _ in rows)
        if embeds:
            self._runtime.want_embeddings(True)
        code = self._runtime.decode()
        if embeds:
            self._runtime.want_embeddings(False)
        self.steps += 1
        if self._team.changed():
            self._runtime.set_threads(self._team.size)
        if code != 0:
            log.error("llama_decode failed with code %d", code)
            self._fail([slot for slot, _ in rows], "the engine failed to decode")
            return
        for slot, row in rows:
            self._after_decode(slot, row)

    def _reap(self) -> None:
        for slot in self._slots:
            if slot.generation is not None and slot.generation.job.cancelled:
                self._release(slot)
        if any(generation.job.cancelled for generation in self._waiting):
            self._waiting = deque(generation for generation in self._waiting if not generation.job.cancelled)

    # --- admission and prefix reuse

    def _admit(self) -> None:
        postponed: deque[LlamaGeneration] = deque()
        idle = [slot for slot in self._slots if slot.generation is None]
        while self._waiting and idle:
            generation = self._waiting.popleft()
            slot = self._prefixes.choose(idle, generation)
            if self._must_wait(slot, generation):
                postponed.append(generation)
            elif self._start(generation):
                idle.remove(slot)
                self._occupy(slot, generation)
        self._waiting.extendleft(reversed(postponed))

    def _must_wait(self, slot: Slot, generation: LlamaGeneration) -> bool:
        """Whether the next step finds the prompt's beginning in a slot, or is the first that can restore it."""
        if generation.saved is not None and self._runtime.has_pending_copies:
            # The cells that a copy is still to read must not be written to before.
            if self._prefilling:
                return True
            generation.saved = None
        # The same long beginning is being evaluated right now: cheaper to wait for it than to do it again.
        reach = self._prefixes.reach(slot, generation)
        prompts = [slot.generation.prompt for slot in self._prefilling if slot.generation is not None]
        return any(common_prefix(other, generation.prompt) - reach >= self._prefixes.gain for other in prompts)

    def _start(self, generation: LlamaGeneration) -> bool:
        """Make the sampler, which is many times the size of the rest. False where that is refused."""
        if generation.embeds:
            return True
        try:
            generation.sampler = Sampler(self._runtime, generation.sampling, generation.grammar, generation.prompt)
        except PoolError as error:
            self._say(generation, Delta(generation.index, error=error))
            self._end(generation)
            return False
        return True

    def _occupy(self, slot: Slot, generation: LlamaGeneration) -> None:
        """Give the slot to a generation, with as much of its prompt as is held anywhere."""
        self._prefixes.fill(slot, generation)
        slot.generation, slot.next_token = generation, None
        generation.started_at = time.perf_counter()
        self._prefilling.append(slot)

    # --- building the batch

    def _add_next_tokens(self) -> list[tuple[Slot, range]]:
        rows = []
        for slot in self._slots:
            generation = slot.generation
            if slot.next_token is not None and generation is not None and not generation.is_behind:
                rows.append(
                    (slot, self._runtime.add(slot.number, len(slot.cached), (slot.next_token,), outputs="last"))
                )
                slot.cached.append(slot.next_token)
        return rows

    def _add_prompts(self, rows: list[tuple[Slot, range]]) -> None:
        """Fill up the batch with pieces of prompts, the oldest first; `rows` gets an entry for each."""
        room = min(self._runtime.n_batch - len(rows), self._prefill_chunk)
        outputs = self._runtime.max_outputs - len(self._slots)
        for slot in self._prefilling:
            if room <= 0:
                return
            generation = slot.generation
            assert generation is not None
            start = len(slot.cached)
            wanted = generation.needs_all_outputs
            chunk = generation.prompt[start : start + (min(room, outputs) if wanted else room)]
            if not chunk:
                continue
            last = start + len(chunk) == len(generation.prompt)
            kind = "all" if wanted else "last" if last else "none"
            rows.append((slot, self._runtime.add(slot.number, start, chunk, outputs=kind)))
            slot.cached.extend(chunk)
            room -= len(chunk)
            outputs -= len(chunk) if wanted else 0

    # --- after the step

    def _after_decode(self, slot: Slot, row: range) -> None:
        generation = slot.generation
        assert generation is not None
        if slot.next_token is None:
            generation.evaluated += len(row)
            if generation.prompt_logprobs:
                self._note_prompt_logprobs(slot, generation, row)
            if generation.embeds:
                self._note_hidden(generation, row)
            if len(slot.cached) < len(generation.prompt):
                return
            self._prefilling.remove(slot)
        if generation.embeds:
            generation.ended_at = time.perf_counter()
            self._say(generation, Delta(generation.index, finish="stop", embedding=generation.hidden))
            self._release(slot)
            return
        if generation.limit <= 0:
            self._finish(slot, generation, "", "length")
            return
        self._take_token(slot, generation, self._runtime.logits(row.stop - 1))

    def _take_token(self, slot: Slot, generation: LlamaGeneration, logits: Logits) -> None:
        assert generation.sampler is not None
        token = generation.sampler.choose(logits)
        if generation.produced == 0:
            generation.first_token_at = time.perf_counter()
        if token == NO_TOKEN or (self._runtime.is_end(token) and not generation.ignore_eos):
            generation.produced += token != NO_TOKEN
            self._finish(slot, generation, generation.assembler.finish(), "stop")
            return
        generation.produced += 1
        if generation.top_logprobs is not None:
            self._note_logprobs(generation, logits, token)
        text = generation.assembler.push(self._runtime.piece(token, special=generation.special))
        if generation.assembler.stopped:
            self._finish(slot, generation, text, "stop")
        elif generation.produced >= generation.limit:
            text += generation.assembler.finish()
            self._finish(slot, generation, text, "stop" if generation.assembler.stopped else "length")
        else:
            slot.next_token = token
            if text:
                self._say(generation, Delta(generation.index, text))

    def _note_prompt_logprobs(self, slot: Slot, generation: LlamaGeneration, row: range) -> None:
        """Row i scores the token after it; the first token of a prompt has no score."""
        first = len(slot.cached) - len(row)
        for offset, index in enumerate(row):
            following = first + offset + 1
            if following < len(generation.prompt):
                token = generation.prompt[following]
                self._note_logprobs(generation, self._runtime.logits(index), token)

    def _note_hidden(self, generation: LlamaGeneration, row: range) -> None:
        total = self._runtime.embeddings(row).sum(axis=0)
        generation.hidden = total if generation.hidden is None else generation.hidden + total

    def _note_logprobs(self, generation: LlamaGeneration, logits: Logits, token: int) -> None:
        logprob, top = top_logprobs(logits, token, generation.top_logprobs or 0)
        piece = self._runtime.piece
        named = tuple((piece(other, special=True), value) for other, value in top)
        generation.pending_logprobs.append(TokenLogprob(piece(token, special=True), logprob, named))

    # --- endings

    def _finish(self, slot: Slot, generation: LlamaGeneration, text: str, finish: str) -> None:
        generation.ended_at = time.perf_counter()
        self._say(generation, Delta(generation.index, text, finish=finish, stop=generation.assembler.stopped_by))
        self._release(slot)

    def _fail(self, slots: Sequence[Slot], message: str) -> None:
        """End the generations of these slots with an error and forget their cache, which may be half written."""
        for slot in slots:
            if slot.generation is not None:
                self._say(slot.generation, Delta(slot.generation.index, error=BackendUnavailable(message)))
                self._release(slot)
            slot.cached = []
            self._runtime.keep_prefix(slot.number, 0)

    def _fail_running(self, message: str) -> None:
        self._fail([slot for slot in self._slots if slot.generation is not None], message)

    def _release(self, slot: Slot) -> None:
        """Free the slot; its cache stays for the next prompt with the same beginning."""
        generation = slot.generation
        assert generation is not None
        if slot in self._prefilling:
            self._prefilling.remove(slot)
        slot.generation, slot.next_token, slot.used_at = None, None, time.perf_counter()
        self._end(generation)

    def _end(self, generation: LlamaGeneration) -> None:
        """Free what the sequence held, and let the next one of its job wait for a slot."""
        if generation.sampler is not None:
            generation.sampler.close()
            generation.sampler = None
        job = generation.job
        if job.pending and not job.cancelled:
            self._waiting.append(job.pending.popleft())

    # --- hand-over

    def _say(self, generation: LlamaGeneration, delta: Delta) -> None:
        delta.logprobs, generation.pending_logprobs = generation.pending_logprobs, []
        generation.said += 1
        self._deltas.append((generation.job.mailbox, delta))

    def _deliver(self) -> None:
        deltas, self._deltas = self._deltas, []
        if deltas:
            deliver(deltas)
