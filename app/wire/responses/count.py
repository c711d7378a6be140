"""Counts the tokens of a prompt with whatever engine a model has: by a chat that says one token."""

from __future__ import annotations

from typing import Any

from app.wire.responses.objects import usage_object
from deployments.requests import CHAT
from deployments.run_info import RunInfo

#: What shapes the answer, and not the prompt.
_LEFT_OUT = ("response_format", "grammar", "logprobs", "top_logprobs", "stop", "stream", "stream_options")


def counting_body(chat: dict[str, Any]) -> dict[str, Any]:
    """A chat body with the same prompt that is over after its first token."""
    body = {name: value for name, value in chat.items() if name not in _LEFT_OUT}
    if "tools" in body and body.get("tool_choice") != "none":
        body["tool_choice"] = "auto"
    return {**body, "max_tokens": 1}


class TokenCount:
    """A `WholeAdapter` whose answer is the number of tokens."""

    path = CHAT

    def __init__(self, chat: dict[str, Any], ignored: list[str]) -> None:
        self.chat, self.ignored = chat, ignored

    def whole(self, completion: dict[str, Any], info: RunInfo) -> dict[str, Any]:
        usage = usage_object(completion.get("usage"), info.report)
        return {"object": "response.input_tokens", "input_tokens": usage["input_tokens"]}
