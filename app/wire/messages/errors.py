"""An error in the shape that Anthropic's clients read."""

from __future__ import annotations

from typing import Any

from cluster import errors

#: Anthropic's name for each status; its clients go by it.
TYPES = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def error_body(error: errors.PoolError, model: str | None = None) -> dict[str, Any]:
    """`{"type": "error", "error": {"type", "message"}}`, with the canonical error's other members in it."""
    said = error.body()["error"]
    if isinstance(error, errors.ContextLengthExceeded):
        # By these words Claude Code knows that it must shorten the conversation.
        said["message"] = f"prompt is too long: {error.message}"
    status = 503 if isinstance(error, errors.QueueFull) else error.status
    kind = TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {**said, "type": kind}}
