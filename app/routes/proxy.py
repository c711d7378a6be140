"""Every path without a route of its own goes to the engine of the model that a request names, and comes back as it is:
method, query, status, headers, body and stream unchanged. Only engines that speak HTTP are asked (CONTRACT section 1).
"""

from __future__ import annotations

import contextlib
from typing import Any

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import Message, Receive, Scope, Send

from app.auth import caller_of, is_admin, refuse_foreign_page, route_path
from app.body import parse, read_body
from app.streams import request_id_of, send_on
from cluster import errors
from cluster.config import ANONYMOUS, PoolConfig
from deployments.engines.protocol import Call
from deployments.engines.registry import backend_of
from deployments.gateway import Gateway
from deployments.requests import parse_raw

#: What a client says to this pool, or about its connection with it, and an engine must not hear.
PRIVATE_HEADERS = frozenset(
    {
        "accept-encoding",
        "authorization",
        "connection",
        "content-length",
        "cookie",
        "expect",
        "forwarded",
        "host",
        "keep-alive",
        "proxy-authorization",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "x-api-key",
    }
)
#: Prefixes whose routes are all the pool's own: what is not there is not found.
OWN_PREFIXES = ("/llm-pool/", "/api/")


class Proxy:
    """The ASGI endpoint of all other paths."""

    def __init__(self, routes: Any) -> None:
        """`routes` are those that win."""
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = route_path(scope)
        # A route that is there, but not for this method, is found behind all others.
        if any(route.matches(scope)[0] is Match.PARTIAL for route in self._routes):
            raise HTTPException(405, "Method Not Allowed")
        if is_admin(path) or path.startswith(OWN_PREFIXES):
            raise HTTPException(404, "Not Found")
        request = Request(scope, receive)
        if caller_of(request).principal == ANONYMOUS:
            # Whatever its method, it may load a model.
            refuse_foreign_page(dict(scope["headers"]))
        gateway: Gateway = request.app.state.gateway
        body = bytes(await read_body(request, gateway.config.max_body_mb))
        wanted = parse_raw(
            gateway.config,
            path,
            await _model(request, body),
            request_id=request_id_of(request),
            headers=request.headers,
            caller=caller_of(request),
        )
        if not _is_served(gateway.config, wanted.model, path):
            raise HTTPException(404, f"the engine of {wanted.model!r} does not serve this path")
        headers = {name: value for name, value in request.headers.items() if name not in PRIVATE_HEADERS}
        query = scope["query_string"].decode("latin-1")
        call = Call(path, body, wanted.trace, scope["method"], query, headers, priority=wanted.priority)
        first, reply = await gateway.pass_through(wanted, call)
        answered = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in reply.headers.items()]
        await send_on(send, reply.status, answered, first, reply.chunks)


def _is_served(config: PoolConfig, model: str, path: str) -> bool:
    """Whether any engine that may answer for a name is asked over HTTP, or has the path; servers are asked anyway."""
    variants = config.names.variants.get(model, ((model, 1.0),))
    known = [config.models[each] for each, _ in variants if each in config.models]
    return not known or any(backend_of(each).raw or path in backend_of(each).paths for each in known)


async def _model(request: Request, body: bytes) -> str | None:
    """The model that a request names: in its query, or in its JSON or form. Raises `InvalidRequest`."""
    name: Any = request.query_params.get("model")
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if name is None and kind == "multipart/form-data":
        name = await _form_field(request, body, "model")
    elif name is None and body and kind in ("application/json", ""):
        # Without a type it may be anything: then it names no model.
        with contextlib.suppress(*(() if kind else (errors.InvalidRequest,))):
            value = await parse(bytearray(body))
            name = value.get("model") if isinstance(value, dict) else None
    if name is not None and not isinstance(name, str):
        raise errors.InvalidRequest("model: must be a string", param="model")
    return name


async def _form_field(request: Request, body: bytes, name: str) -> str | None:
    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    try:
        async with Request(request.scope, receive).form() as form:
            value = form.get(name)
    except HTTPException as error:
        raise errors.InvalidRequest(f"the form cannot be read: {error.detail}") from None
    return None if isinstance(value, UploadFile) else value
