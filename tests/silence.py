"""How long a stream of each family leaves its client without an event that it parses: agents give up then."""

from __future__ import annotations

import time
from typing import Any

import httpx

#: A client gives up that has got no event for so long, in seconds.
PATIENCE_S = 16.0
#: A stream of each family: path, body, and what stands in an event that its client parses.
FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}, "data: {"),
    "completions": ("/v1/completions", {"prompt": "x"}, "data: {"),
    "responses": ("/v1/responses", {"input": "x"}, "data: {"),
    "flat": ("/llm-pool/v1/responses", {"input": "x"}, "data: {"),
    "messages": ("/v1/messages", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 9}, "data: {"),
    "ollama": ("/api/chat", {"messages": [{"role": "user", "content": "x"}]}, "{"),
}


async def longest_silence(url: str, model: str, family: str) -> tuple[float, str]:
    """The longest time without an event that a client parses, and the whole text."""
    path, body, mark = FAMILIES[family]
    longest, last, text = 0.0, time.monotonic(), ""
    async with (
        httpx.AsyncClient(base_url=url, timeout=60) as http,
        http.stream("POST", path, json={"model": model, "stream": True, **body}) as answer,
    ):
        async for line in answer.aiter_lines():
            text += line + "\n"
            if line.startswith(mark):
                longest, last = max(longest, time.monotonic() - last), time.monotonic()
    return longest, text
