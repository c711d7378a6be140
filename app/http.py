"""Builds the HTTP application around a gateway: the families of routes, keys, and errors.

Plain ASGI where it matters: a middleware class that wraps every chunk of a stream in a task of its own would cost
more than the rest of the path together.
"""

from __future__ import annotations

import logging
from importlib.metadata import version

from fastapi import FastAPI, Request, Response
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.routing import Route

from app.answers import error_response
from app.auth import ApiKeyMiddleware, route_path
from app.openapi import document
from app.routes import (
    admin,
    admin_models,
    allocator,
    events,
    llama_router,
    messages,
    ollama,
    openai,
    responses,
    service,
    ui,
    validation,
)
from app.routes.proxy import Proxy
from app.streams import request_id_of
from app.usage import Usage
from cluster import errors
from deployments.gateway import Gateway

logger = logging.getLogger("slotpool.http")


def build_http(gateway: Gateway) -> FastAPI:
    """The ASGI application of one ingress process."""
    # The interactive page's scripts come from here, so that it works without the internet.
    app: FastAPI = FastAPIOffline(title="Slotpool", version=version("slotpool"), redoc_url=None)
    app.state.gateway = gateway
    app.router.routes[:0] = openai.inference_routes
    responses.install(app, gateway)
    gateway.limits.count_in(Usage(app.state.store))
    app.include_router(service.router)
    app.include_router(validation.router)
    app.include_router(allocator.router, prefix="/api/v1")
    app.include_router(openai.router)
    app.include_router(messages.router)
    app.include_router(ollama.router)
    app.include_router(llama_router.router)
    app.include_router(ui.router)
    for prefix in ("/v1/admin", "/admin"):
        app.include_router(admin.router, prefix=prefix)
        app.include_router(admin_models.router, prefix=prefix)
        app.include_router(events.router, prefix=prefix)
    app.include_router(admin.list_router, prefix="/v1/admin")
    app.include_router(admin.short_router, prefix="/admin")
    app.openapi = document(app, [*openai.operations, *responses.operations, *messages.operations, *ollama.operations])  # type: ignore[method-assign]
    app.router.routes.append(Route("/{path:path}", Proxy(tuple(app.router.routes)), include_in_schema=False))
    app.add_exception_handler(errors.PoolError, _pool_error)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, _http_error)  # type: ignore[arg-type]
    app.add_exception_handler(Exception, _bug)
    app.add_middleware(ApiKeyMiddleware, gateway=gateway)
    return app


def _model_of(request: Request) -> str | None:
    """The model that a request is about, by its path or its body."""
    model = request.path_params.get("model") or getattr(request.state, "model", None)
    return model if isinstance(model, str) else None


async def _pool_error(request: Request, error: errors.PoolError) -> Response:
    return _answer(request, error, _model_of(request))


def _answer(request: Request, error: errors.PoolError, model: str | None = None) -> Response:
    return error_response(error, path=route_path(request.scope), model=model, request_id=request_id_of(request))


async def _http_error(request: Request, error: HTTPException) -> Response:
    known: dict[int, str] = {404: "NOT_FOUND", 405: "METHOD_NOT_ALLOWED"}
    message = f"{request.method} {request.url.path}: {error.detail}"
    code = known.get(error.status_code, "INVALID_REQUEST")
    return _answer(request, errors.InvalidRequest(message, status=error.status_code, code=code))


async def _bug(request: Request, error: Exception) -> Response:
    request_id = request_id_of(request)
    logger.error("request %s failed", request_id, exc_info=error)
    failure = errors.PoolError(f"internal error; its id is {request_id}", id=request_id)
    return _answer(request, failure)
