"""Renders what a decoder sends for one call: as a stream of SSE chunks, or collected into one body.

It owns nothing but the text of its own request. Deltas of one sequence that are pending together become one chunk.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Literal, Protocol, TypeVar

from deployments.engines.chat.generation import Delta, Generation, Mailbox
from deployments.engines.chat.logprobs import TokenLogprob
from deployments.engines.chat.metrics import metrics_object
from deployments.engines.chat.prepare import Prepared
from deployments.engines.chat.thinking import ThinkingSplitter, Thought
from deployments.engines.chat.tools import ToolDelta, ToolParser
from deployments.engines.chat.wire import ChatWriter, Choice, CompletionWriter, usage_object
from deployments.engines.protocol import Call, Report
from deployments.sse import DONE

Piece = str | Thought | ToolDelta


J_contra = TypeVar("J_contra", contravariant=True)


class Decoder(Protocol[J_contra]):
    """What makes the tokens of jobs: it takes one, and lets one go that has ended or is not wanted any more."""

    def submit(self, job: J_contra) -> None: ...

    def cancel(self, job: J_contra) -> None: ...


class Reported(Protocol):
    """An answer that has a report."""

    def update_report(self) -> None: ...


async def decoded(
    decoder: Decoder[J_contra], job: J_contra, answer: Reported, chunks: AsyncGenerator[bytes, None]
) -> AsyncGenerator[bytes, None]:
    """The answer's chunks. The decoder hears of the job with the first one that is asked for, and of its end."""
    try:
        decoder.submit(job)
        async for chunk in chunks:
            yield chunk
    finally:
        decoder.cancel(job)
        answer.update_report()
        await chunks.aclose()


class Answer:
    """The answer to one call. Create it when the call arrives, `begin` once prepared, then `stream` or `whole`.

    Whoever ends the answer calls `update_report`; the last chunk has done so before, for its own figures.
    """

    def __init__(self, call: Call, model_id: str) -> None:
        self._call = call
        self._entered_at = time.perf_counter()
        self._model = call.json.get("model") or model_id
        self.report = Report()

    def begin(self, prepared: Prepared, generations: Sequence[Generation], mailbox: Mailbox) -> None:
        self._prepared_at = time.perf_counter()
        self._prepared = prepared
        self._generations = generations
        self._mailbox = mailbox
        options = prepared.options
        kind = ChatWriter if prepared.chat else CompletionWriter
        self._writer = kind(
            self._call.request_id,
            str(self._model),
            with_usage=options.include_usage,
            with_logprobs=options.top_logprobs is not None,
        )
        self._parsers: dict[int, ToolParser] = {}
        if prepared.plan.mode != "none":
            names = frozenset(tool["function"]["name"] for tool in prepared.plan.tools)
            self._parsers = {generation.index: ToolParser(names) for generation in generations}
        self._splitters: dict[int, ThinkingSplitter] = {}
        if prepared.chat:
            start: Literal["opened", "start"] = "opened" if prepared.thinks else "start"
            self._splitters = {generation.index: ThinkingSplitter(start) for generation in generations}

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """SSE bytes, one item for all that was pending. Raises the `PoolError` of a failed sequence."""
        running = len(self._generations)
        opening = b"".join(self._echo_chunk(generation) for generation in self._generations)
        include_usage = self._prepared.options.include_usage
        while running:
            parts = [opening]
            opening = b""
            for delta in _merged(await self._mailbox.take()):
                if delta.error is not None:
                    raise delta.error
                parts.append(self._delta_chunk(delta))
                if delta.finish is not None:
                    running -= 1
                    if running == 0:
                        self.update_report()
                    last = self._last() if running == 0 and not include_usage else {}
                    parts.append(self._writer.finish(delta.index, self._reason(delta), last, delta.stop))
            if running == 0:
                if include_usage:
                    parts.append(self._writer.usage(self._usage(), self._last()))
                parts.append(DONE)
            if chunk := b"".join(parts):
                yield chunk

    async def whole(self) -> AsyncGenerator[bytes, None]:
        """One JSON body."""
        choices = [
            Choice(text=self._echo(generation), logprobs=self._echo_logprobs(generation))
            for generation in self._generations
        ]
        running = len(choices)
        while running:
            for delta in await self._mailbox.take():
                if delta.error is not None:
                    raise delta.error
                choice = choices[delta.index]
                pieces = self._parsed(delta)
                choice.text += "".join(piece for piece in pieces if isinstance(piece, str))
                choice.thoughts += "".join(piece.text for piece in pieces if isinstance(piece, Thought))
                choice.logprobs.extend(delta.logprobs)
                if delta.finish is not None:
                    running -= 1
                    choice.finish, choice.stop = self._reason(delta), delta.stop
                    if delta.index in self._parsers:
                        choice.calls = self._parsers[delta.index].calls
        self.update_report()
        yield self._writer.body(choices, self._usage(), self._last())

    def _parsed(self, delta: Delta) -> list[Piece]:
        """What a delta says: thoughts first, if its model marks them, then text and calls."""
        splitter = self._splitters.get(delta.index)
        if splitter is None:
            return self._said(delta.index, delta.text, is_last=delta.finish is not None)
        split = splitter.push(delta.text)
        if delta.finish is not None:
            split += splitter.finish()
        if splitter.is_done:
            del self._splitters[delta.index]
        thoughts: list[Piece] = [Thought(text) for kind, text in split if kind == "reasoning"]
        text = "".join(text for kind, text in split if kind == "text")
        return thoughts + self._said(delta.index, text, is_last=delta.finish is not None)

    def _said(self, index: int, text: str, *, is_last: bool) -> list[Piece]:
        parser = self._parsers.get(index)
        if parser is None:
            return [text] if text else []
        pieces: list[Piece] = [*parser.push(text)] if text else []
        return [*pieces, *parser.finish()] if is_last else pieces

    def _delta_chunk(self, delta: Delta) -> bytes:
        parts = []
        logprobs: list[TokenLogprob] | None = delta.logprobs
        for piece in self._parsed(delta):
            if isinstance(piece, str):
                parts.append(self._writer.delta(delta.index, piece, logprobs))
                logprobs = None
            elif isinstance(self._writer, ChatWriter):
                if isinstance(piece, Thought):
                    parts.append(self._writer.thought(delta.index, piece.text))
                else:
                    parts.append(self._writer.tool_delta(delta.index, piece))
        if logprobs and not parts:
            parts.append(self._writer.delta(delta.index, "", logprobs))
        return b"".join(parts)

    def _reason(self, delta: Delta) -> str:
        parser = self._parsers.get(delta.index)
        if parser is not None and parser.calls and delta.finish == "stop":
            return "tool_calls"
        return delta.finish or "stop"

    # --- echo

    def _echo(self, generation: Generation) -> str:
        return self._prepared.echoes[generation.index // self._prepared.options.n]

    def _echo_logprobs(self, generation: Generation) -> list[TokenLogprob]:
        """The prompt's first token, which nothing predicted; the decoder reports the others."""
        return [TokenLogprob(generation.first_piece, None)] if generation.prompt_logprobs else []

    def _echo_chunk(self, generation: Generation) -> bytes:
        echo = self._echo(generation)
        return self._writer.delta(generation.index, echo, self._echo_logprobs(generation)) if echo else b""

    # --- the end

    def update_report(self) -> None:
        """Bring the report up to date. Whatever decodes may still be at work: then the figures are a moment's."""
        report, generations = self.report, self._generations
        entered, prepared = self._entered_at, self._prepared_at
        report.prompt_tokens = self._prepared.prompt_tokens
        # Of n choices for one prompt the prompt is counted once; what the others shared with it is no news to a client.
        report.cached_tokens = sum(generation.reused for generation in generations[:: self._prepared.options.n])
        sought = [generation.restored for generation in generations if generation.restored is not None]
        report.restored_tokens = sum(sought) if sought else None
        report.output_tokens = sum(generation.produced for generation in generations)
        report.tokenize_ms = (prepared - entered) * 1e3
        report.total_ms = (time.perf_counter() - entered) * 1e3
        started = min((g.started_at for g in generations if g.started_at), default=None)
        if started is not None:
            report.queue_ms = max(0.0, (started - prepared) * 1e3)
            ended = max(g.ended_at for g in generations) or time.perf_counter()
            report.backend_ms = (ended - started) * 1e3
        if firsts := [g.first_token_at for g in generations if g.first_token_at]:
            report.ttft_ms = (min(firsts) - entered) * 1e3

    def _usage(self) -> dict[str, Any]:
        report = self.report
        return usage_object(report.prompt_tokens or 0, report.output_tokens or 0, report.cached_tokens or 0)

    def _last(self) -> dict[str, Any]:
        """The members of the last chunk, or of the body, beside OpenAI's."""
        return {"metrics": metrics_object(self._call, self.report)}


def _merged(deltas: Sequence[Delta]) -> list[Delta]:
    """Deltas of one sequence joined into one, so that a client that lags behind gets fewer, larger chunks."""
    merged: dict[int, Delta] = {}
    for delta in deltas:
        known = merged.setdefault(delta.index, delta)
        if known is not delta:
            known.text += delta.text
            known.logprobs.extend(delta.logprobs)
            known.finish = known.finish or delta.finish
            known.stop = known.stop or delta.stop
            known.error = known.error or delta.error
    return list(merged.values())
