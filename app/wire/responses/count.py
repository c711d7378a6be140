"""Counts the tokens of a conversation, by its model's own template and vocabulary."""

from __future__ import annotations

from typing import Any

from cluster.errors import BackendUnavailable
from deployments.requests import CHAT
from deployments.run_info import RunInfo
from deployments.schemas import EXTENSIONS, TOKENIZE

#: What is in the prompt; everything else shapes the answer.
PROMPT = ("model", "messages", "tools", "chat_template_kwargs", *EXTENSIONS)


class TokenCount:
    """A `WholeAdapter` whose answer is the number of tokens.

    An external server knows no such call: there a chat that says one token tells it.
    """

    def __init__(self, chat: dict[str, Any], ignored: list[str], *, is_remote: bool) -> None:
        prompt = {name: value for name, value in chat.items() if name in PROMPT}
        self.path = CHAT if is_remote else TOKENIZE
        self.chat = {**prompt, "max_tokens": 1} if is_remote else prompt
        self.ignored = ignored

    def whole(self, completion: dict[str, Any], info: RunInfo) -> dict[str, Any]:
        usage = completion.get("usage")
        count = completion.get("count", usage.get("prompt_tokens") if isinstance(usage, dict) else None)
        if not isinstance(count, int):
            message = "the engine does not count tokens"
            raise BackendUnavailable(message, status=502, code="upstream_response_parse_failure")
        return {"object": "response.input_tokens", "input_tokens": count}
