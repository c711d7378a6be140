"""Renders a chat's answer as Ollama's: lines of JSON, the last of which tells what the answer took, or one object.

There is no line that only says that a request waits: an empty message does. A tool's call is said when it is whole,
since its arguments are an object here.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from app.wire.adapter import NDJSON
from app.wire.ollama.chat import chat_of, checked, generate_of
from app.wire.ollama.errors import error_body
from app.wire.ollama.schema import ChatRequest, GenerateRequest
from cluster.errors import PoolError
from deployments.run_info import RunInfo
from deployments.schemas import CHAT


class OllamaAdapter:
    """Implements `Adapter`, for `/api/chat` and, with `generates`, for `/api/generate`."""

    media_type = NDJSON

    def __init__(self, body: Mapping[str, Any], *, generates: bool = False) -> None:
        """Raises `InvalidRequest`."""
        self._arrived = time.monotonic()
        self._generates = generates
        self.path = CHAT
        if generates:
            request = checked(GenerateRequest, body)
            self.path, self.chat, self.ignored = generate_of(request, body)
            self.is_empty = not (request.prompt or request.images)
        else:
            asked = checked(ChatRequest, body)
            self.chat, self.ignored = chat_of(asked, body)
            self.is_empty = not asked.messages
        self._name = body.get("model")
        self._usage: Mapping[str, Any] = {}
        self._finish: str | None = None
        self._calls: dict[int, dict[str, Any]] = {}

    def begin(self) -> bytes:
        return b""

    def waiting(self, comment: bytes, *, counts: bool) -> bytes:
        return self._line(self._said(""))

    def feed(self, chunk: dict[str, Any]) -> bytes:
        self._usage = chunk.get("usage") or self._usage
        out = []
        for choice in chunk.get("choices") or []:
            delta = choice.get("delta") or {"content": choice.get("text")}
            text, thought = delta.get("content") or "", _thought(delta)
            scores = _logprobs(choice)
            if text or thought or scores:
                out.append(self._line(self._said(text, thought) | scores))
            for call in delta.get("tool_calls") or []:
                _add(self._calls.setdefault(call.get("index") or 0, {}), call)
            self._finish = choice.get("finish_reason") or self._finish
        return b"".join(out)

    def end(self, info: RunInfo) -> bytes:
        calls = [_tool_call(index, call) for index, call in sorted(self._calls.items())]
        called = self._line(self._said("", calls=calls)) if calls else b""
        return called + self._line({**self._said(""), **self._end(self._usage, info)})

    def failed(self, error: PoolError) -> bytes:
        return json.dumps(error_body(error)).encode() + b"\n"

    def whole(self, completion: dict[str, Any], info: RunInfo) -> dict[str, Any]:
        choice = (completion.get("choices") or [{}])[0]
        message = choice.get("message") or {"content": choice.get("text")}
        self._finish = choice.get("finish_reason")
        calls = [_tool_call(index, call) for index, call in enumerate(message.get("tool_calls") or [])]
        said = self._said(message.get("content") or "", _thought(message), calls)
        return {**self._head(), **said, **_logprobs(choice), **self._end(completion.get("usage") or {}, info)}

    def done(self, reason: str) -> dict[str, Any]:
        """The answer to an empty request, which only loads or unloads its model."""
        return {**self._head(), **self._said(""), "done_reason": reason, "done": True}

    def _said(self, text: str, thought: str = "", calls: list[dict[str, Any]] | None = None) -> dict[str, Any]:
        """A piece of the answer, in the words of the route."""
        thinking = {"thinking": thought} if thought else {}
        if self._generates:
            return {"response": text, **thinking, "done": False}
        called = {"tool_calls": calls} if calls else {}
        return {"message": {"role": "assistant", "content": text, **thinking, **called}, "done": False}

    def _head(self) -> dict[str, Any]:
        return {"model": self._name, "created_at": datetime.now(UTC).isoformat().replace("+00:00", "Z")}

    def _line(self, members: Mapping[str, Any]) -> bytes:
        return json.dumps({**self._head(), **members}, ensure_ascii=False).encode() + b"\n"

    def _end(self, usage: Mapping[str, Any], info: RunInfo) -> dict[str, Any]:
        report, metrics = info.report, info.metrics()
        first_ms = metrics["gpu_time_to_first_token_ms"]
        first_ms = (report.ttft_ms or 0.0) if first_ms is None else first_ms
        after_ms = metrics["gpu_decode_after_first_token_ms"]
        after_ms = max(0.0, (report.total_ms or 0.0) - first_ms) if after_ms is None else after_ms
        return {
            "done": True,
            "done_reason": "length" if self._finish == "length" else "stop",
            "total_duration": int((time.monotonic() - self._arrived) * 1e9),
            "load_duration": int(metrics["engine_load_wait_ms"] * 1e6),
            "prompt_eval_count": usage.get("prompt_tokens") or report.prompt_tokens or 0,
            "prompt_eval_duration": int(first_ms * 1e6),
            "eval_count": usage.get("completion_tokens") or report.output_tokens or 0,
            "eval_duration": int(after_ms * 1e6),
        }


def _thought(said: Mapping[str, Any]) -> str:
    return said.get("reasoning_content") or said.get("reasoning") or ""


def _logprobs(choice: Mapping[str, Any]) -> dict[str, Any]:
    found = choice.get("logprobs")
    content = found.get("content") if isinstance(found, dict) else None
    return {"logprobs": content} if content else {}


def _add(call: dict[str, Any], piece: Mapping[str, Any]) -> None:
    """Take a piece of a call to what there is of it."""
    function = piece.get("function") or {}
    call["id"] = call.get("id") or piece.get("id")
    known = call.setdefault("function", {"name": None, "arguments": ""})
    known["name"] = known["name"] or function.get("name")
    known["arguments"] += function.get("arguments") or ""


def _tool_call(index: int, call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function") or {}
    try:
        arguments = json.loads(function.get("arguments") or "{}")
    except ValueError:
        # Cut off, or a model's mistake: the client sees what there was.
        arguments = None
    given = arguments if isinstance(arguments, dict) else {"INVALID_JSON": function.get("arguments")}
    return {"id": call.get("id"), "function": {"index": index, "name": function.get("name"), "arguments": given}}
