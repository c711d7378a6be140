"""What a family of routes is to the pool: an adapter over the chat stream, one object for each request.

Every engine speaks chat completions, so a family that is written once here has every engine. An adapter only renders:
it decides nothing about scheduling or errors, waits for nothing, and is called from one task. `app/routes/adapted.py`
runs it.
"""

from __future__ import annotations

from typing import Any, Protocol

from cluster.errors import PoolError
from deployments.run_info import RunInfo

EVENT_STREAM = "text/event-stream"
NDJSON = "application/x-ndjson"


class WholeAdapter(Protocol):
    """One request of a family that is not streamed.

    `chat` is the body of `path` (chat completions, or completions) that the request stands for. It has passed the
    family's own schema, and carries the pool's extensions (`priority`, `keep_alive`, `timeout_s`, …) under their usual
    names. `ignored` names what was left out of it, as the client knows it: `tools.web_search`.
    """

    path: str
    chat: dict[str, Any]
    ignored: list[str]

    def whole(self, completion: dict[str, Any], info: RunInfo) -> dict[str, Any] | bytes:
        """The answer that is not streamed, of the whole chat completion."""


class Adapter(WholeAdapter, Protocol):
    """One request of a family. A stream calls `begin` once, `waiting` and `feed`, and then `end` or `failed`."""

    media_type: str

    def begin(self) -> bytes:
        """The events that open the stream. Called before the first sign of life, or the first chunk."""

    def waiting(self, comment: bytes, *, counts: bool) -> bytes:
        """A sign of life while the request waits. `comment` is an SSE comment that says where.

        With `counts` it must hold an event that clients parse: some give up on a stream of comments. The first does.
        """

    def feed(self, chunk: dict[str, Any]) -> bytes:
        """The family's events for one chunk of the chat stream; may be empty."""

    def end(self, info: RunInfo) -> bytes:
        """The events that close the stream, once the engine's is over and its report is there."""

    def failed(self, error: PoolError) -> bytes:
        """The family's error event. Nothing comes after it."""


def sse(event: str | None, data: bytes) -> bytes:
    """One server-sent event."""
    head = b"" if event is None else b"event: " + event.encode() + b"\n"
    return head + b"data: " + data + b"\n\n"
