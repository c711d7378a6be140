"""An error in the shape that Ollama's clients read: a text, and nothing that they must know."""

from __future__ import annotations

from typing import Any

from cluster.errors import PoolError


def error_body(error: PoolError, model: str | None = None) -> dict[str, Any]:
    """`{"error": "text"}`; the pool's own code beside it is for people."""
    return {"error": error.message, "code": error.code}
