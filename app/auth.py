"""Who may come in, checked before anything of a request is read: by key, and without keys from this machine only.

A key's name is the principal of its requests. Where no key is needed, a browser is the danger: any page that its user
visits can send requests to this machine, so those that name another host, and those of another site's page that would
change something, are refused.
"""

from __future__ import annotations

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from app.answers import error_response
from app.loopback import is_loopback
from app.streams import request_id_of
from cluster import errors
from cluster.config import Caller, PoolConfig, find_key
from deployments.gateway import Gateway

#: Routes that answer without a key: probes have none.
OPEN_PATHS = {"/health", "/ready"}
#: The status page itself, which asks for a key; its files hold nothing that is anybody's.
PAGE = "/ui"
#: Everything below these is for operators.
ADMIN_PATHS = ("/v1/admin", "/admin", "/models/load", "/models/unload")
#: Methods that change nothing.
SAFE_METHODS = {"GET", "HEAD", "OPTIONS"}

#: Longer ones are refused, in bytes. No client of ours comes near, and both are kept and logged.
MAX_PATH = 8 * 1024
MAX_HEADERS = 64 * 1024


class ApiKeyMiddleware:
    """Turns away who may not come in, and puts a `Caller` into the state of everybody else's request.

    With `admin_keys`, the admin routes need one of these (401 without a known key, 403 with an ordinary one), and an
    admin key opens all other routes as well. Without, an ordinary key is good everywhere. Where no key is needed,
    requests come from this machine (403 otherwise). The keys are those of the configuration in force.
    """

    def __init__(self, app: ASGIApp, gateway: Gateway) -> None:
        self._app = app
        self._gateway = gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            caller = admit(self._gateway.config, scope)
        except errors.PoolError as refusal:
            request_id = request_id_of(HTTPConnection(scope))
            await error_response(refusal, path=route_path(scope), request_id=request_id)(scope, receive, send)
            return
        scope["state"] = {**scope.get("state", {}), "caller": caller}
        await self._app(scope, receive, send)


def caller_of(request: HTTPConnection) -> Caller:
    """Who sent this request."""
    caller: Caller = request.state.caller
    return caller


def admit(config: PoolConfig, scope: Scope) -> Caller:
    """The caller of a request that may come in. Raises `Unauthorized`, `Forbidden` or `InvalidRequest`."""
    if len(scope["path"]) > MAX_PATH or sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADERS:
        raise errors.InvalidRequest("the path or the headers are too long", status=431)
    headers = dict(scope["headers"])
    path = route_path(scope)
    has_keys = bool(config.api_keys or config.admin_keys)
    if has_keys:
        guarded = is_admin(path) and bool(config.admin_keys)
        given = _given_keys(headers)
        key = find_key(given, config.admin_keys)
        if key is not None:
            return Caller.of(key, is_admin=True)
        key = find_key(given, config.api_keys)
        if key is not None:
            if guarded:
                raise errors.Forbidden("this route needs an admin key")
            return Caller.of(key, is_admin=False)
        if is_open(scope["method"], path):
            return Caller(may_pin=False)
        if guarded or config.api_keys:
            kind = "admin" if guarded else "API"
            raise errors.Unauthorized(f"a valid {kind} key is required: Authorization: Bearer <key>")
    refuse_strangers(scope, headers)
    return Caller(may_pin=not has_keys)


def refuse_strangers(scope: Scope, headers: dict[bytes, bytes]) -> None:
    """Raises `Forbidden` for a request without a key that does not come from this machine, or from a foreign page."""
    client = scope.get("client")
    if client is None or not is_loopback(client[0]):
        raise errors.Forbidden("without a key only this machine is served; configure api_keys to serve others")
    host = headers.get(b"host", b"").decode("latin-1").lower()
    if host and not is_loopback(_without_port(host)):
        raise errors.Forbidden("without a key only requests to localhost are served; configure api_keys")
    if scope["method"] not in SAFE_METHODS:
        refuse_foreign_page(headers)


def refuse_foreign_page(headers: dict[bytes, bytes]) -> None:
    """Raises `Forbidden` for what a page of another site has a browser send. Who has shown a key is no such page."""
    host = headers.get(b"host", b"").decode("latin-1").lower()
    origin = headers.get(b"origin")
    if origin is not None:
        is_foreign = origin.decode("latin-1").lower() not in (f"http://{host}", f"https://{host}")
    else:
        is_foreign = headers.get(b"sec-fetch-site", b"none") not in (b"none", b"same-origin")
    if is_foreign:
        raise errors.Forbidden("a page of another site may not change anything here; configure api_keys")


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0]


def _given_keys(headers: dict[bytes, bytes]) -> list[bytes]:
    """Every key that a request carries: some clients send one in each place."""
    kind, _, bearer = headers.get(b"authorization", b"").partition(b" ")
    keys = [bearer.strip() if kind.lower() == b"bearer" else b"", headers.get(b"x-api-key", b"").strip()]
    return [key for key in keys if key]


def route_path(scope: Scope) -> str:
    """The path below the application's own prefix, which is what its routes are matched against."""
    path: str = scope["path"]
    prefix: str = scope.get("root_path", "")
    return path[len(prefix) :] if prefix and path.startswith(prefix) else path


def is_open(method: str, path: str) -> bool:
    """Whether a request needs no key where others do."""
    if path == PAGE or path.startswith(f"{PAGE}/"):
        return method in ("GET", "HEAD")
    return path in OPEN_PATHS or (method, path) == ("HEAD", "/")


def is_admin(path: str) -> bool:
    """Whether a path is one of the operators' routes."""
    return any(path == each or path.startswith(f"{each}/") for each in ADMIN_PATHS)
