"""`detail: {code, model, message}`: what some families' clients look for beside the canonical error."""

from __future__ import annotations

from typing import Any

from cluster.errors import PoolError

#: What those clients call the pool's codes; any other is written in lower case.
DETAIL_CODES = {
    "MODEL_NOT_FOUND": "unknown_model",
    "MODEL_UNAVAILABLE": "model_failed",
    "GPU_OVERLOADED": "executor_queue_full",
}


def detail_of(error: PoolError, model: str | None) -> dict[str, Any]:
    """An error in those words; `model` is the one that the request was about, where that is known."""
    detail = {"code": DETAIL_CODES.get(error.code, error.code.lower()), "message": error.message}
    return detail if model is None else {**detail, "model": model}
