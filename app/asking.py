"""From an HTTP request to the pool's own: who asks, by which id, and with which headers."""

from __future__ import annotations

from typing import Any

from fastapi import Request

from app.auth import caller_of
from app.streams import request_id_of
from cluster.request import Request as PoolRequest
from deployments.gateway import Gateway
from deployments.requests import parse_request


def asked(request: Request, path: str, body: Any, request_id: str | None = None) -> tuple[PoolRequest, dict[str, Any]]:
    """What is asked of the engine's `path` with a body, as `deployments.requests.parse_request` has it."""
    gateway: Gateway = request.app.state.gateway
    return parse_request(
        gateway.config,
        path,
        body,
        request_id=request_id or request_id_of(request),
        headers=request.headers,
        caller=caller_of(request),
    )
