"""The status page: a handful of static files, read once and served as they are. There is nothing secret in them.

What the page shows it asks for itself, of the routes that any client has: the operators' events and calls, with their
key where one is needed, and the chat. No script but these files may run in it, and it may talk to nobody but this pool.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import NamedTuple

from fastapi import APIRouter, Request, Response
from fastapi.responses import RedirectResponse
from starlette.exceptions import HTTPException

router = APIRouter(include_in_schema=False)

#: Where the files are, this package's `ui`.
FOLDER = Path(__file__).parent.parent / "ui"
#: What is served at all, and as what. Browsers run no module whose type is another.
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
#: Styles are set by scripts through the DOM only, which this allows; `style` attributes in markup are not.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # Asked for again each time, and answered with 304 unless an update has changed it.
    "Cache-Control": "no-cache",
}


class File(NamedTuple):
    """One file of the page."""

    content: bytes
    headers: dict[str, str]


@cache
def files() -> dict[str, File]:
    """All files of the page by their path below `/ui/`. Reads the disk at the first call."""
    found = {}
    for path in FOLDER.rglob("*"):
        kind = TYPES.get(path.suffix)
        if kind is not None and path.is_file():
            content = path.read_bytes()
            tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
            found[path.relative_to(FOLDER).as_posix()] = File(content, {**HEADERS, "Content-Type": kind, "ETag": tag})
    return found


@router.get("/")
async def root(request: Request) -> Response:
    """A person with a browser is led to the page. What else asks for `/` wants to know whether somebody is there."""
    if "text/html" not in request.headers.get("accept", ""):
        raise HTTPException(405, "Method Not Allowed")
    return RedirectResponse("ui/", 307, {"Cache-Control": "no-store", "Vary": "Accept"})


@router.get("/ui")
async def page() -> Response:
    """The page's files are found beside it, wherever the pool's own prefix is."""
    return RedirectResponse("ui/", 307)


@router.api_route("/ui/{path:path}", methods=["GET", "HEAD"])
async def file(request: Request, path: str) -> Response:
    """One file of the page; 304 if the browser has it as it is."""
    found = files().get(path or "index.html")
    if found is None:
        raise HTTPException(404, "Not Found")
    if found.headers["ETag"] in request.headers.get("if-none-match", ""):
        return Response(None, 304, found.headers)
    return Response(found.content, 200, found.headers)
