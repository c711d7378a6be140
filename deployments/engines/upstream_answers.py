"""What is changed in a server's answers to chats and completions on their way to the client, and read from them.

The client gets what the server sent, but for three things: the `metrics` of CONTRACT section 2 in the final chunk or
the body, the model's name as the client knows it, and no token counts in a stream that were not asked for: the pool
always asks, since it counts them itself. Only events near the end of a stream are parsed; all others pass as bytes.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from typing import Any

from deployments.engines.chat.metrics import metrics_object
from deployments.engines.protocol import Call, Report
from deployments.engines.upstream_bytes import INLINE_BODY
from deployments.schemas import CHAT, COMPLETIONS

#: An event that may be the last one with a choice, or the one with the counts.
_LAST = re.compile(rb'"finish_reason"\s*:\s*"|"usage"\s*:\s*\{')
#: Inside a JSON string its quotes would be escaped.
_MODEL = re.compile(rb'"model"\s*:\s*"(?:[^"\\]|\\.)*"')
_DONE, _ERROR = b"[DONE]", b'"error"'


def is_generation(call: Call) -> bool:
    """Whether an answer has choices and `metrics`."""
    return call.path in (CHAT, COMPLETIONS) and isinstance(call.body, dict)


class Answer:
    """One answer, as it is read. `report` is complete once the last byte has been given back, however that comes."""

    def __init__(self, call: Call, report: Report, *, renamed: bool) -> None:
        """`renamed`: the server calls the model by another name than the call does."""
        self._call, self._report = call, report
        self._started = time.perf_counter()
        self._shows_usage = bool((call.json.get("stream_options") or {}).get("include_usage"))
        self._model = b'"model": ' + json.dumps(call.json.get("model")).encode() if renamed else None
        self._held: dict[str, Any] | None = None
        self._held_event = b""
        self._is_whole = not is_generation(call)

    def end(self) -> None:
        """There is no more: the report says how long it took."""
        if self._report.total_ms is None:
            self._report.total_ms = self._report.backend_ms = (time.perf_counter() - self._started) * 1e3

    @property
    def is_whole(self) -> bool:
        """Whether a stream that is over has said its last word; without it, its server was lost on the way."""
        return self._is_whole

    # --- streams ------------------------------------------------------------------------------------------------------

    def events(self, events: bytes) -> bytes:
        """What the client gets for some whole events; may be nothing yet."""
        if self._report.ttft_ms is None:
            self._report.ttft_ms = (time.perf_counter() - self._started) * 1e3
        if self._model is not None:
            model = self._model
            events = _MODEL.sub(lambda _: model, events)
        if self._held is None and _DONE not in events and not _LAST.search(events):
            self._is_whole = self._is_whole or _ERROR in events
            return events
        self._is_whole = True
        return b"".join(self._one(event + b"\n\n") for event in events.split(b"\n\n") if event)

    def finish(self) -> bytes:
        """The last chunk, which had to wait for whether it is the last."""
        if self._held is None:
            return b""
        self.end()
        chunk = {**self._held, "metrics": metrics_object(self._call, self._report)}
        self._held = None
        return b"data: " + json.dumps(chunk).encode() + b"\n\n"

    def _one(self, event: bytes) -> bytes:
        data = event.partition(b"data:")[2].strip()
        if data == _DONE:
            return self.finish() + event
        if not data:
            return event
        before = b"" if self._held is None else self._held_event
        chunk = _parsed(data) if _LAST.search(event) else None
        if chunk is None or not isinstance(chunk.get("choices"), list):
            self._held = None
            return before + event
        self._read(chunk)
        if not self._shows_usage and chunk.get("usage") is not None:
            # Some servers send the counts with the last choice, most of them in a chunk of its own.
            if not chunk["choices"]:
                return b""
            del chunk["usage"]
            event = b"data: " + json.dumps(chunk).encode() + b"\n\n"
        self._held, self._held_event = chunk, event
        return before

    # --- bodies -------------------------------------------------------------------------------------------------------

    async def body(self, body: bytes, parsed: dict[str, Any]) -> bytes:
        """What the client gets of a whole body."""
        self._read(parsed)
        self.end()
        if is_generation(self._call):
            parsed["metrics"] = metrics_object(self._call, self._report)
        elif self._model is None:
            return body
        if self._model is not None and "model" in parsed:
            parsed["model"] = self._call.json.get("model")
        if len(body) <= INLINE_BODY:
            return json.dumps(parsed).encode()
        return (await asyncio.to_thread(json.dumps, parsed)).encode()

    def _read(self, answer: dict[str, Any]) -> None:
        """Write down the token counts; a server may well have sent nonsense."""
        usage = answer.get("usage")
        if not isinstance(usage, dict):
            return
        details = usage.get("prompt_tokens_details")
        self._report.prompt_tokens = _count(usage.get("prompt_tokens"))
        self._report.output_tokens = _count(usage.get("completion_tokens"))
        self._report.cached_tokens = _count(details.get("cached_tokens") if isinstance(details, dict) else None)


def _parsed(data: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
