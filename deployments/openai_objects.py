"""The shapes of OpenAI's chat objects, for type checkers: the dictionaries that Python callers give and get.

They name what every engine answers. An engine may add members of its own (`metrics`, `reasoning_content`).
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict

FinishReason = Literal["stop", "length", "tool_calls", "content_filter"]


class Message(TypedDict):
    """One message of a conversation. `content` is text, or parts such as images."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None
    name: NotRequired[str]
    tool_calls: NotRequired[list[dict[str, Any]]]
    tool_call_id: NotRequired[str]


class Usage(TypedDict):
    """What an answer took, in tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class AnswerMessage(TypedDict):
    """What a model said. `content` is None where it only calls tools."""

    role: Literal["assistant"]
    content: str | None
    tool_calls: NotRequired[list[dict[str, Any]]]


class Choice(TypedDict):
    """One of the `n` answers."""

    index: int
    message: AnswerMessage
    finish_reason: FinishReason | None


class ChatCompletion(TypedDict):
    """A whole answer. `created` is in seconds since 1970."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class Delta(TypedDict, total=False):
    """What is new in one chunk; empty while a stream waits, and in its last chunk."""

    role: Literal["assistant"]
    content: str | None
    tool_calls: list[dict[str, Any]]


class ChunkChoice(TypedDict):
    """The part of one of the `n` answers."""

    index: int
    delta: Delta
    finish_reason: FinishReason | None


class ChatChunk(TypedDict):
    """A part of a streamed answer. `usage` comes with the last one, if `stream_options.include_usage` asks for it."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: NotRequired[Usage | None]
