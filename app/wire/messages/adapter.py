"""Renders a chat's answer as Anthropic's: the events of a stream, or one message.

Content blocks come one after the other, each opened and closed; a chat's chunks only say what is new, so a block ends
when another kind of text begins. Tokens are known at the end and stand in `message_delta`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from app.wire.adapter import EVENT_STREAM, sse
from app.wire.messages.chat import chat_of, checked
from app.wire.messages.errors import error_body
from app.wire.messages.schema import MessagesRequest
from cluster.errors import PoolError
from deployments.requests import CHAT
from deployments.run_info import RunInfo

#: What a chat's `finish_reason` is called here.
STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use", "content_filter": "refusal"}

#: Members that the API's own schema wants everywhere, of things that only its servers have.
_UNUSED: dict[str, Any] = {"stop_details": None, "container": None}
_UNUSED_USAGE: dict[str, Any] = {"cache_creation": None, "inference_geo": None, "service_tier": None}

#: Nothing here signs thoughts; but clients drop those without a signature, and models then lose them between calls.
UNSIGNED = "dW5zaWduZWQ="

PING = sse("ping", b'{"type": "ping"}')


class MessagesAdapter:
    """Implements `Adapter`."""

    media_type = EVENT_STREAM
    path = CHAT

    def __init__(self, body: Mapping[str, Any], request_id: str) -> None:
        """Raises `InvalidRequest`."""
        request = checked(MessagesRequest, body)
        self.chat, self.ignored = chat_of(request, body)
        self._max_tokens = request.max_tokens
        self._one_call = bool(request.tool_choice and request.tool_choice.disable_parallel_tool_use)
        self._request_id = request_id
        self._head = {"id": f"msg_{request_id}", "type": "message", "role": "assistant", "model": request.model}
        self._usage: Mapping[str, Any] = {}
        self._finish: str | None = None
        self._stop: str | None = None
        self._blocks = 0
        #: What the open block holds: `text`, `thinking`, or the number of a tool call.
        self._open: str | int | None = None
        self._has_called = False

    def begin(self) -> bytes:
        end = {"stop_reason": None, "stop_sequence": None, "usage": {**_usage({}), **_UNUSED_USAGE}}
        return _event("message_start", message={**self._head, "content": [], **_UNUSED, **end})

    def waiting(self, comment: bytes, *, counts: bool) -> bytes:
        return comment + PING if counts else comment

    def feed(self, chunk: dict[str, Any]) -> bytes:
        self._usage = chunk.get("usage") or self._usage
        out = []
        for choice in chunk.get("choices") or []:
            delta = choice.get("delta") or {}
            if thought := delta.get("reasoning_content") or delta.get("reasoning"):
                out.append(self._said("thinking", {"type": "thinking", "thinking": "", "signature": ""}))
                out.append(self._delta({"type": "thinking_delta", "thinking": thought}))
            if text := delta.get("content"):
                out.append(self._said("text", _text("")))
                out.append(self._delta({"type": "text_delta", "text": text}))
            out += [self._call(call) for call in delta.get("tool_calls") or []]
            if choice.get("finish_reason"):
                self._finish, self._stop = choice["finish_reason"], _stop_of(choice)
        return b"".join(out)

    def end(self, info: RunInfo) -> bytes:
        usage = _usage(self._usage or _reported(info))
        delta = {"stop_reason": self._reason(usage["output_tokens"]), "stop_sequence": self._stop, **_UNUSED}
        return self._close() + _event("message_delta", delta=delta, usage=usage) + _event("message_stop")

    def failed(self, error: PoolError) -> bytes:
        return sse("error", json.dumps({**error_body(error), "request_id": self._request_id}).encode())

    def whole(self, completion: dict[str, Any], info: RunInfo) -> dict[str, Any]:
        choice = (completion.get("choices") or [{}])[0]
        message = choice.get("message") or {}
        self._finish, self._stop = choice.get("finish_reason"), _stop_of(choice)
        content: list[dict[str, Any]] = []
        if thought := message.get("reasoning_content") or message.get("reasoning"):
            content.append({"type": "thinking", "thinking": thought, "signature": UNSIGNED})
        if text := message.get("content"):
            content.append(_text(text))
        calls = message.get("tool_calls") or []
        content += [_tool_use(call) for call in (calls[:1] if self._one_call else calls)]
        usage = _usage(completion.get("usage") or _reported(info))
        self._has_called = bool(calls)
        end = {"stop_reason": self._reason(usage["output_tokens"]), "stop_sequence": self._stop}
        return {**self._head, "content": content, **_UNUSED, **end, "usage": {**usage, **_UNUSED_USAGE}}

    def _call(self, call: Mapping[str, Any]) -> bytes:
        """A piece of a tool call. A model that may make one only, and makes another, is cut short."""
        index, function = call.get("index") or 0, call.get("function") or {}
        if self._one_call and index > 0:
            return b""
        self._has_called = True
        start = self._said(index, _tool_block(call.get("id") or f"call_{index}", function.get("name"), {}))
        arguments = function.get("arguments")
        return start + (self._delta({"type": "input_json_delta", "partial_json": arguments}) if arguments else b"")

    def _said(self, what: str | int, block: Mapping[str, Any]) -> bytes:
        """The end of the open block and the start of another, unless this one goes on."""
        if self._open == what:
            return b""
        closed = self._close()
        self._open = what
        return closed + _event("content_block_start", index=self._blocks, content_block=block)

    def _delta(self, delta: Mapping[str, Any]) -> bytes:
        return _event("content_block_delta", index=self._blocks, delta=delta)

    def _close(self) -> bytes:
        if self._open is None:
            return b""
        signed = b""
        if self._open == "thinking":
            signed = self._delta({"type": "signature_delta", "signature": UNSIGNED})
        self._open = None
        self._blocks += 1
        return signed + _event("content_block_stop", index=self._blocks - 1)

    def _reason(self, output_tokens: int) -> str:
        if self._stop is not None:
            return "stop_sequence"
        if self._finish == "length" and 0 < output_tokens < self._max_tokens:
            return "model_context_window_exceeded"
        # Some servers say `stop` behind a call as well.
        if self._has_called and self._finish == "stop":
            return "tool_use"
        return STOP_REASONS.get(self._finish or "", "end_turn")


def _event(kind: str, **members: Any) -> bytes:
    return sse(kind, json.dumps({"type": kind, **members}, ensure_ascii=False, separators=(",", ":")).encode())


def _text(text: str) -> dict[str, Any]:
    # The API's schema requires the member and takes null; the AI SDK takes a list only.
    return {"type": "text", "text": text, "citations": []}


def _tool_block(call_id: str | None, name: str | None, given: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "tool_use", "id": call_id, "name": name, "input": given, "caller": {"type": "direct"}}


def _usage(usage: Mapping[str, Any]) -> dict[str, Any]:
    """A chat's usage in Anthropic's words, where the tokens that were cached are not in `input_tokens`."""
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return {
        "input_tokens": max(0, (usage.get("prompt_tokens") or 0) - cached),
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": usage.get("completion_tokens") or 0,
        "output_tokens_details": None,
        "server_tool_use": None,
    }


def _reported(info: RunInfo) -> dict[str, Any]:
    """The usage by the engine's report, where its stream says nothing of it."""
    report = info.report
    details = {"cached_tokens": report.cached_tokens}
    tokens = {"prompt_tokens": report.prompt_tokens, "completion_tokens": report.output_tokens}
    return {**tokens, "prompt_tokens_details": details}


def _stop_of(choice: Mapping[str, Any]) -> str | None:
    """The stop string that ended a choice. Engines that name a token instead have met no string."""
    stop = choice.get("stop_reason")
    return stop if isinstance(stop, str) else None


def _tool_use(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function") or {}
    arguments = function.get("arguments") or "{}"
    try:
        given = json.loads(arguments)
    except ValueError:
        given = None
    # Cut off by `max_tokens`, or a model's mistake: the client sees what there was, in the way Anthropic's docs name.
    shown = given if isinstance(given, dict) else {"INVALID_JSON": arguments}
    return _tool_block(call.get("id"), function.get("name"), shown)
