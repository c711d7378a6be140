"""Errors as HTTP answers: the one canonical body, and what some families of routes add to it."""

from __future__ import annotations

import json
from typing import Any

from fastapi import Response

from cluster import errors

#: Families whose clients look for `detail: {code, model, message}` beside the canonical error.
DETAILED_PATHS = ("/llm-pool/", "/v1/admin/", "/admin/")

#: What those clients call the pool's codes; any other code is written in lower case.
DETAIL_CODES = {
    "MODEL_NOT_FOUND": "unknown_model",
    "MODEL_UNAVAILABLE": "model_failed",
    "GPU_OVERLOADED": "executor_queue_full",
}
#: Where a model is in no state to do what was asked, those families answer 409 and not 503.
CONFLICTS = {"model_not_loaded", "model_loading", "model_unloading", "model_failed"}


def error_response(error: errors.PoolError, *, path: str = "", model: str | None = None) -> Response:
    """The contract's body with the true status, and `Retry-After` in whole seconds on 429 and 503.

    Who was refused for load learns from `X-Queue-Position` where he would have stood.

    `path` is the route's, `model` the one that the request was about, for the families that say so in `detail`.
    """
    status, body = error.status, error.body()
    if path.startswith(DETAILED_PATHS):
        detail = _detail(error, model)
        body["detail"] = detail
        if detail["code"] in CONFLICTS and status == 503:
            status = 409
    headers = {}
    if status in (429, 503):
        headers["Retry-After"] = str(max(1, round(error.retry_after or 1)))
    if "queue_position" in error.extras:
        headers["X-Queue-Position"] = str(error.extras["queue_position"])
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Response(json.dumps(body), status, headers, media_type="application/json")


def _detail(error: errors.PoolError, model: str | None) -> dict[str, Any]:
    detail = {"code": DETAIL_CODES.get(error.code, error.code.lower()), "message": error.message}
    return detail if model is None else {**detail, "model": model}
