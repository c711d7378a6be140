"""The response object of the official API, and its usage."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from app.wire.responses.chat import functions
from app.wire.responses.schema import ResponsesRequest
from cluster.errors import PoolError, QueueFull, RateLimited
from deployments.engines.protocol import Report

#: Why an answer is not complete, by the chat stream's reason for its end.
INCOMPLETE = {"length": "max_output_tokens", "content_filter": "content_filter"}


def response_object(request: ResponsesRequest, response_id: str, model: str) -> dict[str, Any]:
    """A response that has not begun. What the client asked for is repeated in it, as its official type wants."""
    text = request.text.model_dump(exclude_none=True) if request.text is not None else {}
    return {
        "id": response_id,
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "in_progress",
        "background": bool(request.background),
        "error": None,
        "incomplete_details": None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "max_tool_calls": request.max_tool_calls,
        "model": model,
        "output": [],
        "output_text": "",
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": request.previous_response_id,
        "reasoning": _reasoning(request),
        "service_tier": "default",
        "store": request.store is not False,
        # Those of the chat route, where a client has said nothing.
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "presence_penalty": _number(request.extras.get("presence_penalty")),
        "frequency_penalty": _number(request.extras.get("frequency_penalty")),
        "text": {"format": {"type": "text"}, **text},
        "tool_choice": _choice(request.tool_choice),
        "tools": [_tool(tool) for tool in functions(request, [])],
        "top_logprobs": request.top_logprobs or 0,
        "truncation": "disabled",
        "usage": None,
        "user": None,
        "safety_identifier": _text(request.extras.get("safety_identifier")),
        "prompt_cache_key": _text(request.extras.get("prompt_cache_key")),
        "metadata": _metadata(request.extras.get("metadata")),
        "metrics": None,
    }


def usage_object(usage: Mapping[str, Any] | None, report: Report) -> dict[str, Any]:
    """Token counts: those of the chat answer, or else of the engine's report."""
    given = usage or {}
    prompt, output = _count(given, "prompt_tokens"), _count(given, "completion_tokens")
    prompt = (report.prompt_tokens or 0) if prompt is None else prompt
    output = (report.output_tokens or 0) if output is None else output
    cached = _count(given.get("prompt_tokens_details"), "cached_tokens")
    thought = _count(given.get("completion_tokens_details"), "reasoning_tokens")
    return {
        "input_tokens": prompt,
        "input_tokens_details": {
            "cached_tokens": (report.cached_tokens or 0) if cached is None else cached,
            "cache_write_tokens": 0,
        },
        "output_tokens": output,
        "output_tokens_details": {"reasoning_tokens": thought or 0},
        "total_tokens": prompt + output,
    }


def response_error(error: PoolError) -> dict[str, Any]:
    """An error as a member of a response. Its official codes are few, so the pool's own stands beside it."""
    is_load = isinstance(error, QueueFull | RateLimited)
    code = "rate_limit_exceeded" if is_load else "invalid_prompt" if 400 <= error.status < 500 else "server_error"
    return {"code": code, "message": error.message, "param": error.param, "type": error.code}


def _count(counts: Any, name: str) -> int | None:
    value = counts.get(name) if isinstance(counts, Mapping) else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _reasoning(request: ResponsesRequest) -> dict[str, Any]:
    given = request.reasoning
    return {"effort": given.effort if given else None, "summary": given.summary if given else None}


def _choice(choice: str | dict[str, Any] | None) -> str | dict[str, Any]:
    return "auto" if choice is None else choice


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    known = ("type", "name", "description", "parameters", "strict")
    return {name: tool.get(name) for name in known}


def _number(given: Any) -> float:
    return float(given) if isinstance(given, int | float) else 0.0


def _text(given: Any) -> str | None:
    return given if isinstance(given, str) else None


def _metadata(given: Any) -> dict[str, str]:
    if not isinstance(given, Mapping):
        return {}
    return {key: value for key, value in given.items() if isinstance(value, str)}
