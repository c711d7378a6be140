"""Builds the HTTP application around a gateway: the families of routes, keys, and errors.

Plain ASGI where it matters: a middleware class that wraps every chunk of a stream in a task of its own would cost
more than the rest of the path together.
"""

from __future__ import annotations

import json
import logging
import secrets
from importlib.metadata import version

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from app.routes import openai, service
from app.routes.openai import request_id_of
from cluster import errors
from deployments.gateway import Gateway

logger = logging.getLogger("slotpool.http")

#: Routes that answer without a key: probes have none.
OPEN_PATHS = {"/health", "/ready"}


def build_http(gateway: Gateway) -> FastAPI:
    """The ASGI application of one ingress process."""
    app = FastAPI(title="Slotpool", version=version("slotpool"), redoc_url=None)
    app.state.gateway = gateway
    app.include_router(service.router)
    app.include_router(openai.router)
    app.add_exception_handler(errors.PoolError, _pool_error)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, _http_error)  # type: ignore[arg-type]
    app.add_exception_handler(Exception, _bug)
    if gateway.config.api_keys:
        app.add_middleware(Doorman, keys=gateway.config.api_keys)
    return app


class Doorman:
    """Turns away requests without a key, if keys are set, before anything of them is read."""

    def __init__(self, app: ASGIApp, keys: tuple[str, ...]) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or self._knows(dict(scope["headers"])):
            await self._app(scope, receive, send)
        else:
            refusal = error_response(errors.Unauthorized("a valid API key is required: Authorization: Bearer <key>"))
            await refusal(scope, receive, send)

    def _knows(self, headers: dict[bytes, bytes]) -> bool:
        kind, _, key = headers.get(b"authorization", b"").partition(b" ")
        key = key.strip() if kind.lower() == b"bearer" else headers.get(b"x-api-key", b"")
        # Every key is compared, in constant time each, so that the answer's delay tells nothing.
        matches = [secrets.compare_digest(key, known.encode()) for known in self._keys]
        return any(matches)


def error_response(error: errors.PoolError) -> Response:
    """The contract's body with the true status, and `Retry-After` in whole seconds on 429 and 503."""
    headers = {}
    if error.status in (429, 503):
        headers["Retry-After"] = str(max(1, round(error.retry_after or 1)))
    return Response(json.dumps(error.body()), error.status, headers, media_type="application/json")


async def _pool_error(_: Request, error: errors.PoolError) -> Response:
    return error_response(error)


async def _http_error(request: Request, error: HTTPException) -> Response:
    known: dict[int, str] = {404: "NOT_FOUND", 405: "METHOD_NOT_ALLOWED"}
    message = f"{request.method} {request.url.path}: {error.detail}"
    return error_response(
        errors.InvalidRequest(message, status=error.status_code, code=known.get(error.status_code, "INVALID_REQUEST"))
    )


async def _bug(request: Request, error: Exception) -> Response:
    request_id = request_id_of(request)
    logger.error("request %s failed", request_id, exc_info=error)
    return error_response(errors.PoolError(f"internal error; its id is {request_id}", id=request_id))
