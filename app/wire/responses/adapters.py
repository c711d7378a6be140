"""Two renderers of one Responses request: the official events and objects, and the pool dialect's flat ones."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from app.wire.adapter import EVENT_STREAM, sse
from app.wire.detail import detail_of
from app.wire.responses.objects import INCOMPLETE, response_error, response_object, usage_object
from app.wire.responses.output import Event, Output
from app.wire.responses.schema import ResponsesRequest
from cluster.errors import PoolError
from deployments.requests import CHAT
from deployments.run_info import RunInfo


class Responses:
    """The official API. `response` is the object as it stands, and whole once the answer has ended."""

    media_type, path = EVENT_STREAM, CHAT

    def __init__(
        self, request: ResponsesRequest, response_id: str, model: str, chat: dict[str, Any], ignored: list[str]
    ) -> None:
        self.chat, self.ignored = chat, ignored
        self.response = response_object(request, response_id, model)
        self.output = Output()
        #: Whether the stream has the pool's own event. The metrics stand in the last one's response, too.
        self.tells_metrics = True
        self._sequence = 0
        self._has_begun = False

    def begin(self) -> bytes:
        return self._event("response.created", response=self.response)

    def waiting(self, comment: bytes, *, counts: bool) -> bytes:
        if not counts:
            return comment
        if self._has_begun or not comment.startswith(b": queued"):
            return comment + self._in_progress()
        queued = {**self.response, "status": "queued"}
        return comment + self._event("response.queued", response=queued)

    def feed(self, chunk: dict[str, Any]) -> bytes:
        begun = b"" if self._has_begun else self._in_progress()
        return begun + self._events(self.output.feed(chunk))

    def end(self, info: RunInfo) -> bytes:
        begun = b"" if self._has_begun else self._in_progress()
        rendered = begun + self._events(self.output.finish())
        self._finish(info)
        if self.tells_metrics:
            rendered += self._event("response.metrics", id=self.response["id"], metrics=self.response["metrics"])
        return rendered + self._event(f"response.{self.response['status']}", response=self.response)

    def failed(self, error: PoolError) -> bytes:
        self.fail(error)
        said = self._event("error", code=error.code, message=error.message, param=error.param)
        return said + self._event("response.failed", response=self.response)

    def whole(self, completion: dict[str, Any], info: RunInfo) -> dict[str, Any]:
        self.output.whole(completion)
        self._finish(info)
        return self.response

    def fail(self, error: PoolError) -> None:
        """The answer ends here, with what there is of it."""
        self.response |= {"status": "failed", "error": response_error(error), "output": self.output.items}
        self.response["output_text"] = self.output.text

    def _finish(self, info: RunInfo) -> None:
        reason = INCOMPLETE.get(self.output.finish_reason or "")
        self.response |= {
            "status": "completed" if reason is None else "incomplete",
            "incomplete_details": None if reason is None else {"reason": reason},
            "completed_at": int(time.time()) if reason is None else None,
            "output": self.output.items,
            "output_text": self.output.text,
            "usage": usage_object(self.output.usage, info.report),
            "metrics": info.metrics(),
        }

    def _in_progress(self) -> bytes:
        self._has_begun = True
        return self._event("response.in_progress", response=self.response)

    def _events(self, events: list[Event]) -> bytes:
        return b"".join(self._event(**event) for event in events)

    def _event(self, type: str, **members: Any) -> bytes:
        event = {"type": type, "sequence_number": self._sequence, **members}
        self._sequence += 1
        return sse(type, dumps(event))


class FlatResponses(Responses):
    """The pool dialect: a handful of events and a flat object."""

    def begin(self) -> bytes:
        return _flat_event("response.created", id=self._id, model=self.response["model"], object="response")

    def waiting(self, comment: bytes, *, counts: bool) -> bytes:
        return comment + self._delta("") if counts else comment

    def feed(self, chunk: dict[str, Any]) -> bytes:
        return self._deltas(self.output.feed(chunk))

    def end(self, info: RunInfo) -> bytes:
        rendered = self._deltas(self.output.finish())
        self._finish(info)
        rendered += _flat_event("response.metrics", id=self._id, metrics=self.response["metrics"])
        return rendered + _flat_event("response.completed", id=self._id, output_text=self.response["output_text"])

    def failed(self, error: PoolError) -> bytes:
        self.fail(error)
        return _flat_event("error", **error.body(), detail=detail_of(error, self.response["model"]))

    def whole(self, completion: dict[str, Any], info: RunInfo) -> dict[str, Any]:
        return flat(super().whole(completion, info))

    @property
    def _id(self) -> str:
        return str(self.response["id"])

    def _deltas(self, events: list[Event]) -> bytes:
        texts = [event["delta"] for event in events if event["type"] == "response.output_text.delta"]
        return self._delta("".join(texts)) if texts else b""

    def _delta(self, text: str) -> bytes:
        return _flat_event("response.output_text.delta", id=self._id, delta=text)


def flat(response: Mapping[str, Any]) -> dict[str, Any]:
    """A response object as the pool dialect's clients know it. Calls, of which they know nothing, stand at the end."""
    calls = [item for item in response["output"] if item["type"] == "function_call"]
    return {
        "id": response["id"],
        "object": "response",
        "model": response["model"],
        "output": [{"type": "output_text", "text": response["output_text"]}, *calls],
        "output_text": response["output_text"],
        "metrics": response["metrics"],
    }


def _flat_event(event: str, **members: Any) -> bytes:
    return sse(event, dumps(members))


def dumps(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
