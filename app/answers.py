"""Errors as HTTP answers: the one canonical error, in the shape that each family's clients read."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from fastapi import Response

from app.wire.detail import detail_of
from app.wire.messages import errors as messages
from app.wire.ollama import errors as ollama
from cluster import errors

#: Where a model is in no state to do what was asked, those families answer 409 and not 503.
CONFLICTS = {"model_not_loaded", "model_loading", "model_unloading", "model_failed"}

#: The longest that anybody refused for load is told to stay away, in seconds: some clients obey to the letter.
MAX_RETRY_AFTER_S = 20

#: Renders an error; the model that the request was about is known where the route's path names it.
Body = Callable[[errors.PoolError, str | None], dict[str, Any]]


def _openai(error: errors.PoolError, model: str | None) -> dict[str, Any]:
    return error.body()


def _detailed(error: errors.PoolError, model: str | None) -> dict[str, Any]:
    """The canonical error, and beside it `detail` with other names for the codes."""
    return {**error.body(), "detail": detail_of(error, model)}


class Family(NamedTuple):
    """How a family says that something went wrong. `overload` is the status for who was refused for load.

    With `names_request` the body and a header `request-id` carry the request's id. `schema` is the body's name in the
    OpenAPI document.
    """

    body: Body
    overload: int = 429
    names_request: bool = False
    schema: str = "Error"


def _allocator(error: errors.PoolError, model: str | None) -> dict[str, Any]:
    """Its clients look for "queue" or "timeout" in a text."""
    kinds: dict[type[errors.PoolError], str] = {errors.QueueFull: "queue full: ", errors.BackendTimeout: "timeout: "}
    return {**error.body(), "detail": kinds.get(type(error), "") + error.message}


OPENAI = Family(_openai)
#: By the path's beginning, the first that fits. Clients of Responses and Messages retry after a 5xx, not after a 429.
FAMILIES = (
    ("/llm-pool/", Family(_detailed)),
    ("/v1/admin/", Family(_detailed)),
    ("/admin/", Family(_detailed)),
    ("/v1/responses", Family(_openai, overload=503)),
    ("/v1/messages", Family(messages.error_body, overload=503, names_request=True, schema="MessagesError")),
    ("/api/v1/", Family(_allocator, overload=503)),
    ("/api/", Family(ollama.error_body, schema="OllamaError")),
)


def family_of(path: str) -> Family:
    """The family of a route's path."""
    return next((family for prefix, family in FAMILIES if path.startswith(prefix)), OPENAI)


def error_response(
    error: errors.PoolError, *, path: str = "", model: str | None = None, request_id: str | None = None
) -> Response:
    """The family's body with the true status, and `Retry-After` in whole seconds on 429 and 503.

    Who was refused for load learns from `X-Queue-Position` where he would have stood.

    `path` is the route's, `model` the one that the request was about, for the families that say so.
    """
    family = family_of(path)
    body = family.body(error, model)
    status = family.overload if isinstance(error, errors.QueueFull) else error.status
    if status == 503 and family.body is _detailed and body["detail"]["code"] in CONFLICTS:
        status = 409
    headers = {}
    if family.names_request and request_id is not None:
        body["request_id"] = headers["request-id"] = request_id
    if status in (429, 503):
        longest = None if isinstance(error, errors.RateLimited) else MAX_RETRY_AFTER_S
        wait_s = max(1, round(error.retry_after or 1))
        headers["Retry-After"] = str(min(wait_s, longest or wait_s))
    if "queue_position" in error.extras:
        headers["X-Queue-Position"] = str(error.extras["queue_position"])
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Response(json.dumps(body), status, headers, media_type="application/json")
