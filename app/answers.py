"""Errors as HTTP answers: the one canonical error, in the shape that each family's clients read."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from fastapi import Response

from cluster import errors

#: What the clients of `detail: {code, model, message}` call the pool's codes; any other is written in lower case.
DETAIL_CODES = {
    "MODEL_NOT_FOUND": "unknown_model",
    "MODEL_UNAVAILABLE": "model_failed",
    "GPU_OVERLOADED": "executor_queue_full",
}
#: Where a model is in no state to do what was asked, those families answer 409 and not 503.
CONFLICTS = {"model_not_loaded", "model_loading", "model_unloading", "model_failed"}

#: Anthropic's name for each status; its clients go by it.
ANTHROPIC_TYPES = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}

#: The longest that anybody refused for load is told to stay away, in seconds: some clients obey to the letter.
MAX_RETRY_AFTER_S = 20

#: Renders an error; the model that the request was about is known where the route's path names it.
Body = Callable[[errors.PoolError, str | None], dict[str, Any]]


def _openai(error: errors.PoolError, model: str | None) -> dict[str, Any]:
    return error.body()


def _detailed(error: errors.PoolError, model: str | None) -> dict[str, Any]:
    """The canonical error, and beside it `detail` with other names for the codes."""
    detail = {"code": DETAIL_CODES.get(error.code, error.code.lower()), "message": error.message}
    return {**error.body(), "detail": detail if model is None else {**detail, "model": model}}


def _anthropic(error: errors.PoolError, model: str | None) -> dict[str, Any]:
    status = 503 if isinstance(error, errors.QueueFull) else error.status
    kind = ANTHROPIC_TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {**error.body()["error"], "type": kind}}


def _ollama(error: errors.PoolError, model: str | None) -> dict[str, Any]:
    return {"error": error.message, "code": error.code}


class Family(NamedTuple):
    """How a family says that something went wrong. `overload` is the status for who was refused for load."""

    body: Body
    overload: int = 429


OPENAI = Family(_openai)
#: By the path's beginning, the first that fits. Clients of Responses and Messages retry after a 5xx, not after a 429.
FAMILIES = (
    ("/llm-pool/", Family(_detailed)),
    ("/v1/admin/", Family(_detailed)),
    ("/admin/", Family(_detailed)),
    ("/v1/responses", Family(_openai, overload=503)),
    ("/v1/messages", Family(_anthropic, overload=503)),
    ("/api/v1/", OPENAI),
    ("/api/", Family(_ollama)),
)


def family_of(path: str) -> Family:
    """The family of a route's path."""
    return next((family for prefix, family in FAMILIES if path.startswith(prefix)), OPENAI)


def error_response(error: errors.PoolError, *, path: str = "", model: str | None = None) -> Response:
    """The family's body with the true status, and `Retry-After` in whole seconds on 429 and 503.

    Who was refused for load learns from `X-Queue-Position` where he would have stood.

    `path` is the route's, `model` the one that the request was about, for the families that say so.
    """
    family = family_of(path)
    body = family.body(error, model)
    status = family.overload if isinstance(error, errors.QueueFull) else error.status
    if status == 503 and "detail" in body and body["detail"]["code"] in CONFLICTS:
        status = 409
    headers = {}
    if status in (429, 503):
        longest = None if isinstance(error, errors.RateLimited) else MAX_RETRY_AFTER_S
        wait_s = max(1, round(error.retry_after or 1))
        headers["Retry-After"] = str(min(wait_s, longest or wait_s))
    if "queue_position" in error.extras:
        headers["X-Queue-Position"] = str(error.extras["queue_position"])
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Response(json.dumps(body), status, headers, media_type="application/json")
