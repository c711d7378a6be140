"""What goes into vLLM's routes and what comes out, where it differs from what the pool promises to its clients.

vLLM's answers are passed on as bytes, event for event. Only the last ones of a stream are read, for their token counts.
Pure: nothing here imports vLLM.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from cluster.errors import (
    BackendUnavailable,
    ContextLengthExceeded,
    InvalidRequest,
    PoolError,
    RateLimited,
    UnsupportedParameter,
)
from deployments.engines.chat.metrics import metrics_object
from deployments.engines.chat.request import UNSUPPORTED, refuse
from deployments.engines.protocol import Call, Report
from deployments.schemas import CHAT, COMPLETIONS, DETOKENIZE, TOKENIZE

#: An event that ends a choice.
_FINISHES = re.compile(rb'"finish_reason":\s*"')
_TOO_LONG = ("maximum context length", "cannot be greater than max_model_len", "exceeds model's maximum context")
#: What vLLM says of a form that it cannot hold an answer to.
_CONSTRAINT = re.compile(r"schema|grammar|structured|json", re.IGNORECASE)
#: Messages of vLLM are cut to this many characters.
MAX_MESSAGE = 1000


def request_body(call: Call, context: int, *, reasons: bool = True) -> bytes:
    """The body for vLLM. Raises `UnsupportedParameter` for a field that it would not honour.

    `context` is the model's, in tokens, and `reasons` says whether it can be told how much to think.
    """
    body = {name: value for name, value in call.json.items() if name != "model"}
    if call.path in (TOKENIZE, DETOKENIZE):
        body = _tokenize_body(body)
    elif call.path in (CHAT, COMPLETIONS):
        body = _generation_body(call.path, body, context)
        if call.path == CHAT:
            body = _chat_body(body, reasons)
    return json.dumps(body).encode()


def _tokenize_body(body: dict[str, Any]) -> dict[str, Any]:
    """llama-server calls the text `content` and adds no special tokens by default, vLLM `prompt`, and adds them."""
    given = dict(body)
    content, add_special = given.pop("content", None), given.pop("add_special", None)
    if content is not None:
        given |= {"prompt": content, "add_special_tokens": False}
    if add_special is not None:
        given["add_special_tokens"] = add_special
    given.pop("with_pieces", None)
    return {name: value for name, value in given.items() if value is not None}


def _generation_body(path: str, body: dict[str, Any], context: int) -> dict[str, Any]:
    refuse(body, UNSUPPORTED)
    if (body.get("best_of") or body.get("n") or 1) != (body.get("n") or 1):
        raise UnsupportedParameter("best_of other than n is not supported", param="best_of")
    given = {name: value for name, value in body.items() if value is not None}
    clamps = given.pop("clamp_max_tokens", False)
    for name in ("max_tokens", "max_completion_tokens"):
        if clamps and name in given:
            given[name] = min(given[name], context)
    if clamps and path == COMPLETIONS:
        given.setdefault("max_tokens", context)
    repeat, grammar = given.pop("repeat_penalty", None), given.pop("grammar", None)
    if repeat is not None:
        given.setdefault("repetition_penalty", repeat)
    if grammar is not None:
        given["structured_outputs"] = {"grammar": grammar}
    if given.get("top_k") == -1:
        given["top_k"] = 0
    if given.get("stream"):
        # Always, since the pool counts tokens; who has not asked for it does not get to see it.
        given["stream_options"] = {**given.get("stream_options", {}), "include_usage": True}
    else:
        given.pop("stream_options", None)
    return given


def _chat_body(body: dict[str, Any], reasons: bool) -> dict[str, Any]:
    body["messages"] = [
        {**message, "role": "system"} if message.get("role") == "developer" else message for message in body["messages"]
    ]
    if not body.get("tools"):
        # vLLM refuses an empty list, and a choice among no tools.
        body.pop("tools", None)
        if body.get("tool_choice") in ("auto", "none"):
            del body["tool_choice"]
    elif body.get("tool_choice", "auto") not in ("auto", "none"):
        # A call that is forced keeps to its schema; vLLM's parsers hold it to that where the tool itself is strict.
        body["tools"] = [_strict(tool) for tool in body["tools"]]
    thinks, reasoning = body.pop("enable_thinking", None), body.pop("reasoning", None)
    if isinstance(reasoning, dict) and reasoning.get("effort"):
        body.setdefault("reasoning_effort", reasoning["effort"])
    if not reasons and body.get("reasoning_effort", "none") != "none":
        raise UnsupportedParameter("this model does not reason", param="reasoning_effort")
    if thinks is not None:
        body["chat_template_kwargs"] = {"enable_thinking": thinks, **body.get("chat_template_kwargs", {})}
    if body.get("continue_final_message"):
        body.setdefault("add_generation_prompt", False)
    return body


def _strict(tool: dict[str, Any]) -> dict[str, Any]:
    function = tool.get("function")
    return {**tool, "function": {**function, "strict": True}} if isinstance(function, dict) else tool


class Answer:
    """The bytes of one answer. `report` is filled from what vLLM says of it."""

    def __init__(self, call: Call, served_name: str, report: Report, piece: Callable[[int], str] = str) -> None:
        """`piece` is the text of one token."""
        self._call, self._report, self._piece = call, report, piece
        self._shows_usage = bool((call.json.get("stream_options") or {}).get("include_usage"))
        name = call.json.get("model")
        self._names = (_name_member(served_name), _name_member(name)) if name not in (None, served_name) else None
        self._held = b""

    def event(self, event: bytes) -> bytes:
        """What the client gets of one event of a stream; empty while it has to wait. Raises the error that it tells."""
        if event.startswith(b'data: {"error"'):
            raise refusal(500, event.removeprefix(b"data: "), self._call.json)
        if b'"choices":[]' in event:
            return self._last(event)
        event = self._renamed(event)
        if event.startswith(b"data: [DONE]"):
            held, self._held = self._held, b""
            return held + event
        if _FINISHES.search(event):
            # The last of them is to have the metrics, which come behind it.
            event, self._held = self._held, event
            return event
        return event

    def body(self, body: bytes) -> bytes:
        """What the client gets of a body that is not streamed."""
        said = _parsed(body)
        _fill(self._report, said)
        path = self._call.path
        if self._call.json.get("model") is not None and "model" in said:
            said["model"] = self._call.json["model"]
        if path == DETOKENIZE:
            said["content"] = said.get("prompt")
        elif path == TOKENIZE and self._call.json.get("with_pieces"):
            said["tokens"] = [{"id": token, "piece": self._piece(token)} for token in said["tokens"]]
        elif path in (CHAT, COMPLETIONS):
            for choice in said.get("choices", ()):
                message = choice.get("message")
                if message is not None and (thoughts := message.pop("reasoning", None)):
                    message["reasoning_content"] = thoughts
            said["metrics"] = metrics_object(self._call, self._report)
        return json.dumps(said, ensure_ascii=False, separators=(",", ":")).encode()

    def _last(self, event: bytes) -> bytes:
        """The event with the usage: for the client, if it has asked; else the one before it has the metrics."""
        said = _parsed(event.removeprefix(b"data: "))
        _fill(self._report, said)
        metrics = metrics_object(self._call, self._report)
        held, self._held = self._held, b""
        if self._shows_usage or not held:
            said["metrics"] = metrics
            shown = held + _event(said) if self._shows_usage else b""
            return self._renamed(shown)
        last = _parsed(held.removeprefix(b"data: "))
        last["metrics"] = metrics
        return _event(last)

    def _renamed(self, event: bytes) -> bytes:
        if self._names is not None:
            event = event.replace(*self._names, 1)
        # A quote inside of a text is escaped, so this is the member's name.
        return event.replace(b'"reasoning":', b'"reasoning_content":')


def _name_member(name: Any) -> bytes:
    return f'"model":{json.dumps(name, ensure_ascii=False)}'.encode()


def _event(said: Mapping[str, Any]) -> bytes:
    return b"data: " + json.dumps(said, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def _parsed(data: bytes) -> dict[str, Any]:
    try:
        said = json.loads(data)
    except ValueError:
        said = None
    if not isinstance(said, dict):
        raise BackendUnavailable("the engine's answer cannot be read")
    return said


def _fill(report: Report, said: Mapping[str, Any]) -> None:
    """Write down the token counts, and where vLLM's own time went."""
    usage = said.get("usage") or {}
    report.prompt_tokens = usage.get("prompt_tokens", report.prompt_tokens)
    report.output_tokens = usage.get("completion_tokens", report.output_tokens)
    report.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    times = said.get("metrics") or {}
    first, decode = times.get("time_to_first_token_ms"), times.get("generation_time_ms")
    report.queue_ms = times.get("queue_time_ms")
    if first is not None and decode is not None:
        report.backend_ms = first + decode
        if report.ttft_ms is not None and report.queue_ms is not None:
            report.tokenize_ms = max(0.0, report.ttft_ms - first - report.queue_ms)


def refusal(status: int, body: bytes, asked: Mapping[str, Any]) -> PoolError:
    """What a status of vLLM's means to the pool's clients, with vLLM's own words; `asked` are the request's fields."""
    try:
        said = json.loads(body)
    except ValueError:
        said = None
    error = said.get("error") if isinstance(said, dict) else None
    told = error if isinstance(error, dict) else {}
    message = str(told.get("message") or f"the engine answered {status}")[:MAX_MESSAGE]
    param = told.get("param") if isinstance(told.get("param"), str) else None
    if param is None and _CONSTRAINT.search(message):
        param = next((field for field in ("response_format", "grammar") if asked.get(field)), None)
    code = told.get("code")
    status = code if isinstance(code, int) and 400 <= code < 600 else status
    if any(words in message for words in _TOO_LONG):
        return ContextLengthExceeded(message, param=param)
    if status == 429:
        return RateLimited(message, retry_after=1)
    if status < 500 or status == 501:
        return InvalidRequest(message, param=param)
    return BackendUnavailable(message, retry_after=1)
