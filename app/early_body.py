"""A middleware of Serve's HTTP proxy: the body of a request travels with its head.

Serve hands the ingress the head only, and the ingress fetches the body with a remote call to the proxy, about a
quarter of what a request spends on its way. A small body that came in one piece is sent along in the ASGI scope; the
ingress reads it there, and fetches any other as ever. `RAY_FLAGS` in `app.cli` puts this into the proxy.
"""

from __future__ import annotations

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

#: The scope's key, which no client can set.
BODY = "slotpool.body"
#: Above this many bytes sending it twice would cost more than the call.
LIMIT = 64 * 1024


def middlewares() -> list[Middleware]:
    """What Serve asks for when its proxy starts."""
    return [Middleware(EarlyBody)]


class EarlyBody:
    """Puts a small body into the scope; whoever reads it the usual way still can."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        first: Message | None = await receive()
        assert first is not None
        if first["type"] == "http.request" and not first.get("more_body"):
            body = first.get("body", b"")
            if len(body) <= LIMIT:
                scope = {**scope, BODY: body}

        async def replay() -> Message:
            nonlocal first
            message, first = first, None
            return message if message is not None else await receive()

        await self._app(scope, replay, send)
