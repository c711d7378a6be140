"""What tests read from answers, whole and streamed."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.errors import PoolError
from deployments.schemas import CHAT
from tests.contract.pool import OneModel

Events = list[dict[str, Any]]


def text_of(body: dict[str, Any], index: int = 0) -> str:
    """The text of one choice of a body, of chat or completions."""
    choice = body["choices"][index]
    text: str = choice["text"] if "text" in choice else choice["message"]["content"]
    return text


def pieces_of(events: Events, index: int = 0) -> list[str]:
    """The texts of one choice of a stream, as they came."""
    choices = [choice for event in events for choice in event["choices"] if choice["index"] == index]
    texts = [choice["text"] if "text" in choice else choice["delta"].get("content") for choice in choices]
    return [text for text in texts if text]


def streamed_text(events: Events, index: int = 0) -> str:
    """The text of one choice of a stream."""
    return "".join(pieces_of(events, index))


def finish_of(events: Events, index: int = 0) -> str | None:
    """Why one choice of a stream has ended; it says so once."""
    choices = [choice for event in events for choice in event["choices"] if choice["index"] == index]
    reasons = [choice["finish_reason"] for choice in choices if choice.get("finish_reason")]
    assert len(reasons) == 1
    return str(reasons[0])


async def assert_refused(engine: OneModel, fields: dict[str, Any], param: str, path: str = CHAT) -> None:
    """An engine that cannot honour a field says so before the first byte, with 400 and the field's name."""
    for stream in (False, True):
        with pytest.raises(PoolError) as refused:
            await engine.body({**fields, "stream": stream}, path)
        assert (refused.value.status, refused.value.param) == (400, param)
