"""Small helpers that call an engine as the replica does."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from deployments.engines.protocol import Call, Engine

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"

#: A prompt, a tool and a form of an answer that many tests ask for.
SEA = "Write one sentence about the sea."
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}, "unit": {"enum": ["C", "F"]}},
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 10},
        "married": {"type": "boolean"},
        "colours": {"type": "array", "items": {"enum": ["red", "blue"]}, "minItems": 1, "maxItems": 2},
    },
    "required": ["name", "married", "colours"],
    "additionalProperties": False,
}


def ask(text: str, **fields: Any) -> dict[str, Any]:
    """A greedy chat body of one user message."""
    return {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 24, **fields}


async def stream_of(engine: Engine, call: Call) -> AsyncGenerator[bytes, None]:
    """The bytes of the answer to a call."""
    async with aclosing((await engine.call(call)).chunks) as answer:
        async for chunk in answer:
            yield chunk


async def body(engine: Engine, fields: dict[str, Any], path: str = CHAT) -> dict[str, Any]:
    items = [item async for item in stream_of(engine, Call(path, fields, "r"))]
    assert len(items) == 1
    answer: dict[str, Any] = json.loads(items[0])
    return answer


async def text(engine: Engine, fields: dict[str, Any]) -> str:
    content: str = (await body(engine, fields))["choices"][0]["message"]["content"]
    return content


async def events(engine: Engine, fields: dict[str, Any], path: str = CHAT) -> list[dict[str, Any]]:
    """The stream's events, after checking how it is framed."""
    raw = b""
    async for item in stream_of(engine, Call(path, {**fields, "stream": True}, "r")):
        assert item.endswith(b"\n\n"), "an event was split"
        raw += item
    parts = raw.decode().split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]
