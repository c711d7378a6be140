"""A stream of Messages, checked event by event against Anthropic's own types."""

from __future__ import annotations

import json
from typing import Any

from anthropic import types
from anthropic.types.shared import ErrorResponse

EVENTS: dict[str, Any] = {
    "message_start": types.RawMessageStartEvent,
    "message_delta": types.RawMessageDeltaEvent,
    "message_stop": types.RawMessageStopEvent,
    "content_block_start": types.RawContentBlockStartEvent,
    "content_block_delta": types.RawContentBlockDeltaEvent,
    "content_block_stop": types.RawContentBlockStopEvent,
    "error": ErrorResponse,
}


def checked(text: str) -> list[dict[str, Any]]:
    """The events of a stream's text. Each is named like its type and has that type's members, `ping` aside."""
    seen = [json.loads(line[6:]) for line in text.split("\n") if line.startswith("data: ")]
    assert [line[7:] for line in text.split("\n") if line.startswith("event: ")] == [event["type"] for event in seen]
    for event in seen:
        if event["type"] != "ping":
            EVENTS[event["type"]].model_validate(event, strict=True)
    return seen
