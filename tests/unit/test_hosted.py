"""Tools of a hosted service in a chat: left out, and said."""

from __future__ import annotations

from typing import Any

import pytest

from app.wire.hosted import without_hosted_tools
from tests.unit.scripted import Scripted, said

ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
HOSTED = [{"type": "web_search"}, {"type": "custom", "custom": {"name": "x"}}, {"type": "web_search"}]
CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"tools": [*HOSTED, ADD]}, {"tools": [ADD]}),
        ({"tools": [*HOSTED, ADD], "tool_choice": "required"}, {"tools": [ADD], "tool_choice": "required"}),
        ({"tools": [*HOSTED, ADD], "tool_choice": {"type": "custom"}}, {"tools": [ADD]}),
        ({"tools": HOSTED, "tool_choice": "auto"}, {}),
    ],
)
def test_functions_are_all_that_is_left(given: dict[str, Any], kept: dict[str, Any]):
    assert without_hosted_tools({**CHAT, **given}) == ({**CHAT, **kept}, ["tools.web_search", "tools.custom"])


@pytest.mark.parametrize("body", [CHAT, {**CHAT, "tools": [ADD]}, {"tools": 7}, {"tools": [7]}, [], None])
def test_a_body_without_any_is_left_as_it_is(body: Any):
    assert without_hosted_tools(body) == (body, [])


@pytest.mark.parametrize("stream", [False, True])
async def test_the_answer_says_what_was_left_out(stream: bool):
    gateway = Scripted(said("a") if stream else [b"{}"])
    async with gateway.http() as http:
        answer = await http.post("/v1/chat/completions", json={**CHAT, "tools": [*HOSTED, ADD], "stream": stream})
    assert answer.status_code == 200
    assert answer.headers["x-slotpool-ignored"] == "tools.web_search, tools.custom"
    assert gateway.requests[0][1]["tools"] == [ADD]
