"""OpenAI's bodies and stream chunks as bytes.

A chunk is made for every token of every stream, so all of it but the text is rendered once per request; only the text
goes through `json.dumps`. The writers keep no text: what they are given is what they render.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from deployments.engines.chat.logprobs import TokenLogprob, chat_logprobs, completion_logprobs
from deployments.engines.chat.tools import ToolCall, ToolDelta


@dataclass(slots=True)
class Choice:
    """One whole answer, for a body that is not streamed."""

    text: str = ""
    thoughts: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: str = "stop"
    #: The stop string that ended it.
    stop: str | None = None

    @property
    def end(self) -> dict[str, Any]:
        """Why it ended: `finish_reason`, and vLLM's `stop_reason` where a stop string did it."""
        return _end(self.finish, self.stop)


class Writer(Protocol):
    """Renders one request's answer. `last` carries the members that only the final chunk or the body has."""

    def delta(self, index: int, text: str, logprobs: Sequence[TokenLogprob] | None) -> bytes: ...

    def finish(self, index: int, reason: str, last: Mapping[str, Any], stop: str | None = None) -> bytes: ...

    def usage(self, usage: Mapping[str, Any], last: Mapping[str, Any]) -> bytes: ...

    def body(self, choices: Sequence[Choice], usage: Mapping[str, Any], last: Mapping[str, Any]) -> bytes: ...


def usage_object(prompt: int, completion: int, cached: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _end(reason: str, stop: str | None) -> dict[str, Any]:
    return {"finish_reason": reason} if stop is None else {"finish_reason": reason, "stop_reason": stop}


class _Envelope:
    """The members that every chunk of a stream, or the body, has in common."""

    def __init__(self, prefix: str, request_id: str, model: str, *, with_usage: bool, with_logprobs: bool) -> None:
        self._head = {"id": f"{prefix}-{request_id}", "created": int(time.time()), "model": model}
        self._with_logprobs = with_logprobs
        # A stream that was asked for usage says `usage: null` on every chunk but the last.
        self._usage_null = ',"usage":null' if with_usage else ""

    def _chunk_head(self, kind: str) -> str:
        return 'data: {"object":"' + kind + '",' + dumps(self._head)[1:-1] + ',"choices":['

    def _chunk_tail(self, last: Mapping[str, Any]) -> str:
        return self._usage_null + ("," + dumps(last)[1:-1] if last else "") + "}\n\n"

    def _body(self, kind: str, choices: list[dict[str, Any]], *members: Mapping[str, Any]) -> bytes:
        body: dict[str, Any] = {"object": kind, **self._head, "choices": choices}
        for member in members:
            body.update(member)
        return dumps(body).encode()


class ChatWriter(_Envelope):
    """`chat.completion` and `chat.completion.chunk`."""

    def __init__(self, request_id: str, model: str, *, with_usage: bool = False, with_logprobs: bool = False) -> None:
        super().__init__("chatcmpl", request_id, model, with_usage=with_usage, with_logprobs=with_logprobs)
        self._start = self._chunk_head("chat.completion.chunk")
        self._begun: set[int] = set()
        self._text_tail = ',"finish_reason":null}]' + self._chunk_tail({})

    def delta(self, index: int, text: str, logprobs: Sequence[TokenLogprob] | None) -> bytes:
        scores = dumps(chat_logprobs(logprobs)) if logprobs else "null"
        content = json.dumps(text, ensure_ascii=False)
        return (
            f'{self._role(index)}{self._start}{{"index":{index},"delta":{{"content":{content}}},"logprobs":{scores}'
            f"{self._text_tail}"
        ).encode()

    def thought(self, index: int, text: str) -> bytes:
        """What the model thinks, under the name that llama-server, vLLM and their clients have for it."""
        content = dumps({"reasoning_content": text})
        return (
            f'{self._role(index)}{self._start}{{"index":{index},"delta":{content},"logprobs":null{self._text_tail}'
        ).encode()

    def tool_delta(self, index: int, delta: ToolDelta) -> bytes:
        entry: dict[str, Any] = {"index": delta.position}
        if delta.id is not None:
            entry |= {"id": delta.id, "type": "function", "function": {"name": delta.name, "arguments": ""}}
        else:
            entry["function"] = {"arguments": delta.arguments}
        content = dumps({"tool_calls": [entry]})
        return (
            f'{self._role(index)}{self._start}{{"index":{index},"delta":{content},"logprobs":null{self._text_tail}'
        ).encode()

    def finish(self, index: int, reason: str, last: Mapping[str, Any], stop: str | None = None) -> bytes:
        end = dumps(_end(reason, stop))[1:]
        return (
            f'{self._role(index)}{self._start}{{"index":{index},"delta":{{}},"logprobs":null,{end}]{self._chunk_tail(last)}'
        ).encode()

    def usage(self, usage: Mapping[str, Any], last: Mapping[str, Any]) -> bytes:
        return f"{self._start}],{dumps({'usage': usage, **last})[1:]}\n\n".encode()

    def body(self, choices: Sequence[Choice], usage: Mapping[str, Any], last: Mapping[str, Any]) -> bytes:
        rendered = [self._choice(index, choice) for index, choice in enumerate(choices)]
        return self._body("chat.completion", rendered, {"usage": usage}, last)

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": choice.text or (None if choice.calls else "")}
        message["refusal"] = None
        if choice.thoughts:
            message["reasoning_content"] = choice.thoughts
        if choice.calls:
            message["tool_calls"] = [
                {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
                for c in choice.calls
            ]
        scores = chat_logprobs(choice.logprobs) if self._with_logprobs else None
        return {"index": index, "message": message, "logprobs": scores, **choice.end}

    def _role(self, index: int) -> str:
        """The chunk that opens a choice; empty when it was opened before."""
        if index in self._begun:
            return ""
        self._begun.add(index)
        delta = '{"role":"assistant","content":""}'
        return f'{self._start}{{"index":{index},"delta":{delta},"logprobs":null{self._text_tail}'


class CompletionWriter(_Envelope):
    """`text_completion`, streamed or not."""

    def __init__(self, request_id: str, model: str, *, with_usage: bool = False, with_logprobs: bool = False) -> None:
        super().__init__("cmpl", request_id, model, with_usage=with_usage, with_logprobs=with_logprobs)
        self._start = self._chunk_head("text_completion")
        self._text_tail = ',"finish_reason":null}]' + self._chunk_tail({})
        self._offsets: dict[int, int] = {}

    def delta(self, index: int, text: str, logprobs: Sequence[TokenLogprob] | None) -> bytes:
        offset = self._offsets.get(index, 0)
        self._offsets[index] = offset + len(text)
        scores = dumps(completion_logprobs(logprobs, offset)) if logprobs else "null"
        content = json.dumps(text, ensure_ascii=False)
        return f'{self._start}{{"index":{index},"text":{content},"logprobs":{scores}{self._text_tail}'.encode()

    def finish(self, index: int, reason: str, last: Mapping[str, Any], stop: str | None = None) -> bytes:
        end = dumps(_end(reason, stop))[1:]
        return f'{self._start}{{"index":{index},"text":"","logprobs":null,{end}]{self._chunk_tail(last)}'.encode()

    def usage(self, usage: Mapping[str, Any], last: Mapping[str, Any]) -> bytes:
        return f"{self._start}],{dumps({'usage': usage, **last})[1:]}\n\n".encode()

    def body(self, choices: Sequence[Choice], usage: Mapping[str, Any], last: Mapping[str, Any]) -> bytes:
        rendered = [
            {
                "index": index,
                "text": choice.text,
                "logprobs": completion_logprobs(choice.logprobs, 0) if self._with_logprobs else None,
                **choice.end,
            }
            for index, choice in enumerate(choices)
        ]
        return self._body("text_completion", rendered, {"usage": usage}, last)
