"""Makes output items of a chat stream, and the official events that tell of them.

Items follow each other as the model writes them: thoughts, text, calls. One is open at a time; whatever begins next
closes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from app.wire.responses.items import new_id
from deployments.engines.chat.thinking import ThinkingSplitter

Event = dict[str, Any]


class Output:
    """The items of one answer. Each method returns events without their `sequence_number`."""

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self.finish_reason: str | None = None
        self.usage: Any = None
        self._splitter = ThinkingSplitter()
        self._open: dict[str, Any] | None = None
        self._calls: dict[Any, dict[str, Any]] = {}

    @property
    def text(self) -> str:
        """All text of the answer, without thoughts."""
        messages = (item for item in self.items if item["type"] == "message")
        return "".join(part["text"] for item in messages for part in item["content"])

    def feed(self, chunk: Mapping[str, Any]) -> list[Event]:
        """The events of one chunk of the chat stream."""
        if chunk.get("usage"):
            self.usage = chunk["usage"]
        events: list[Event] = []
        choices = chunk.get("choices")
        for choice in choices if isinstance(choices, list) else ():
            if isinstance(choice, dict):
                delta = choice.get("delta")
                events += self._delta(delta if isinstance(delta, dict) else {}, choice.get("logprobs"))
                self.finish_reason = choice.get("finish_reason") or self.finish_reason
        return events

    def whole(self, completion: Mapping[str, Any]) -> None:
        """Take a whole chat completion."""
        choices = completion.get("choices")
        for choice in choices if isinstance(choices, list) else ():
            message = choice.get("message") if isinstance(choice, dict) else None
            if isinstance(message, dict):
                calls = message.get("tool_calls")
                for index, call in enumerate(calls if isinstance(calls, list) else ()):
                    if isinstance(call, dict):
                        call.setdefault("index", index)
                self.feed({"choices": [{**choice, "delta": message}], "usage": completion.get("usage")})
        self.finish()

    def finish(self) -> list[Event]:
        """Close what is open. An answer that says nothing is an empty message."""
        events = self._pieces(self._splitter.finish(), None)
        if not self.items:
            events += self._opened("message")
        return events + self._close()

    def _delta(self, delta: Mapping[str, Any], logprobs: Any) -> list[Event]:
        events: list[Event] = []
        thought = delta.get("reasoning_content") or delta.get("reasoning")
        if isinstance(thought, str) and thought:
            events += self._said("reasoning", thought, None)
        content = delta.get("content") or delta.get("refusal")
        if isinstance(content, str) and content:
            events += self._pieces(self._splitter.push(content), logprobs)
        calls = delta.get("tool_calls")
        for call in calls if isinstance(calls, list) else ():
            if isinstance(call, dict):
                events += self._call(call)
        return events

    def _pieces(self, pieces: list[Any], logprobs: Any) -> list[Event]:
        events: list[Event] = []
        for kind, text in pieces:
            events += self._said("reasoning" if kind == "reasoning" else "message", text, logprobs)
        return events

    # --- text and thoughts

    def _said(self, kind: str, text: str, logprobs: Any) -> list[Event]:
        events = [] if self._open is not None and self._open["type"] == kind else self._opened(kind)
        assert self._open is not None
        part = self._open["content"][0]
        part["text"] += text
        event = {"type": f"response.{part['type']}.delta", **self._where(self._open), "content_index": 0, "delta": text}
        if kind == "message":
            scores = _scores(logprobs)
            part["logprobs"] += scores
            event["logprobs"] = scores
        return [*events, event]

    def _opened(self, kind: str) -> list[Event]:
        """Open a message, or thoughts, with the one part that it has."""
        if kind == "message":
            item: dict[str, Any] = {"type": kind, "id": new_id(kind), "status": "in_progress", "role": "assistant"}
            part: dict[str, Any] = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        else:
            item = {"type": kind, "id": new_id(kind), "status": "in_progress", "summary": []}
            part = {"type": "reasoning_text", "text": ""}
        events = self._add({**item, "content": []})
        assert self._open is not None
        self._open["content"].append(part)
        where = {**self._where(self._open), "content_index": 0}
        return [*events, {"type": "response.content_part.added", **where, "part": _copy(part)}]

    # --- calls

    def _call(self, call: Mapping[str, Any]) -> list[Event]:
        function = call.get("function")
        function = function if isinstance(function, dict) else {}
        index, events = call.get("index", 0), []
        item = self._calls.get(index)
        if item is None:
            item = {
                "type": "function_call",
                "id": new_id("function_call"),
                "status": "in_progress",
                "call_id": str(call.get("id") or new_id("call")),
                "name": str(function.get("name") or ""),
                "arguments": "",
            }
            self._calls[index] = item
            events += self._add(item)
        arguments = function.get("arguments")
        if isinstance(arguments, str) and arguments:
            item["arguments"] += arguments
            where = self._where(item)
            events.append({"type": "response.function_call_arguments.delta", **where, "delta": arguments})
        return events

    # --- opening and closing

    def _add(self, item: dict[str, Any]) -> list[Event]:
        events = self._close()
        self._open = item
        self.items.append(item)
        index = len(self.items) - 1
        return [*events, {"type": "response.output_item.added", "output_index": index, "item": _copy(item)}]

    def _close(self) -> list[Event]:
        item, self._open = self._open, None
        if item is None:
            return []
        item["status"] = "incomplete" if self.finish_reason == "length" else "completed"
        where = self._where(item)
        events: list[Event] = []
        if item["type"] == "function_call":
            said = {"name": item["name"], "arguments": item["arguments"]}
            events.append({"type": "response.function_call_arguments.done", **where, **said})
        else:
            part = item["content"][0]
            done = {"type": f"response.{part['type']}.done", **where, "content_index": 0, "text": part["text"]}
            if "logprobs" in part:
                done["logprobs"] = list(part["logprobs"])
            events.append(done)
            events.append({"type": "response.content_part.done", **where, "content_index": 0, "part": _copy(part)})
        return [
            *events,
            {"type": "response.output_item.done", "output_index": where["output_index"], "item": _copy(item)},
        ]

    def _where(self, item: dict[str, Any]) -> dict[str, Any]:
        index = next(index for index, each in enumerate(self.items) if each is item)
        return {"item_id": item["id"], "output_index": index}


def _copy(value: dict[str, Any]) -> dict[str, Any]:
    """A copy that does not change when the item goes on."""
    return {key: list(each) if isinstance(each, list) else each for key, each in value.items()}


def _scores(logprobs: Any) -> list[dict[str, Any]]:
    content = logprobs.get("content") if isinstance(logprobs, Mapping) else None
    return [_score(each) for each in content if isinstance(each, dict)] if isinstance(content, list) else []


def _score(token: Mapping[str, Any]) -> dict[str, Any]:
    """One token's score. The official type wants its bytes, which servers may leave out."""
    text = str(token.get("token", ""))
    listed = token.get("bytes")
    score = {
        "token": text,
        "bytes": listed if isinstance(listed, list) else list(text.encode("utf-8", "replace")),
        "logprob": token.get("logprob"),
    }
    top = token.get("top_logprobs")
    if isinstance(top, list):
        score["top_logprobs"] = [_score(each) for each in top if isinstance(each, dict)]
    return score
