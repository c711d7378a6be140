"""Who may come in: keys for everybody, keys for operators, checked before anything of a request is read."""

from __future__ import annotations

import secrets

from starlette.types import ASGIApp, Receive, Scope, Send

from app.answers import error_response
from cluster import errors

#: Routes that answer without a key: probes have none.
OPEN_PATHS = {"/health", "/ready"}
#: Everything below these is for operators.
ADMIN_PATHS = ("/v1/admin", "/admin")


class ApiKeyMiddleware:
    """Turns away requests without a key that is good for the route.

    With `admin_keys`, the admin routes need one of these (401 without a known key, 403 with an ordinary one), and an
    admin key opens all other routes as well. Without, an ordinary key is good everywhere. Without any keys at all
    nothing is asked for.
    """

    def __init__(self, app: ASGIApp, api_keys: tuple[str, ...], admin_keys: tuple[str, ...]) -> None:
        self._app = app
        self._api_keys = api_keys
        self._admin_keys = admin_keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        if refusal is None:
            await self._app(scope, receive, send)
        else:
            await error_response(refusal)(scope, receive, send)

    def _refusal(self, scope: Scope) -> errors.PoolError | None:
        path = route_path(scope)
        guarded = is_admin(path) and bool(self._admin_keys)
        if path in OPEN_PATHS or not (guarded or self._api_keys):
            return None
        key = _key(dict(scope["headers"]))
        if _is_one_of(key, self._admin_keys):
            return None
        if _is_one_of(key, self._api_keys):
            return errors.Forbidden("this route needs an admin key") if guarded else None
        kind = "admin" if guarded else "API"
        return errors.Unauthorized(f"a valid {kind} key is required: Authorization: Bearer <key>")


def route_path(scope: Scope) -> str:
    """The path below the application's own prefix, which is what its routes are matched against."""
    path: str = scope["path"]
    prefix: str = scope.get("root_path", "")
    return path[len(prefix) :] if prefix and path.startswith(prefix) else path


def is_admin(path: str) -> bool:
    """Whether a path is one of the operators' routes."""
    return any(path == each or path.startswith(f"{each}/") for each in ADMIN_PATHS)


def _key(headers: dict[bytes, bytes]) -> bytes:
    kind, _, key = headers.get(b"authorization", b"").partition(b" ")
    return key.strip() if kind.lower() == b"bearer" else headers.get(b"x-api-key", b"")


def _is_one_of(key: bytes, known: tuple[str, ...]) -> bool:
    # Every key is compared, in constant time each, so that the answer's delay tells nothing.
    matches = [secrets.compare_digest(key, each.encode()) for each in known]
    return any(matches)
