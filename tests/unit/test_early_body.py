"""The proxy's middleware: a small body rides along, nothing that the application may read is lost."""

from __future__ import annotations

from typing import Any

import pytest

from app.early_body import BODY, LIMIT, EarlyBody

LEFT = {"type": "http.disconnect"}


def part(body: bytes, more_body: bool = False) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more_body}


async def through(method: str, messages: list[dict[str, Any]]) -> tuple[bytes | None, list[dict[str, Any]]]:
    """The early body that the application is given, and all the messages that it then receives."""
    left = iter(messages)
    seen: list[Any] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope.get(BODY))
        seen.append([await receive() for _ in messages])

    async def receive() -> dict[str, Any]:
        return next(left)

    async def send(message: Any) -> None:
        raise AssertionError("nothing is sent")

    await EarlyBody(application)({"type": "http", "method": method, "headers": []}, receive, send)
    return seen[0], seen[1]


@pytest.mark.parametrize(
    ("method", "messages", "early"),
    [
        ("POST", [part(b"{}"), LEFT], b"{}"),
        ("POST", [part(b"x" * LIMIT), LEFT], b"x" * LIMIT),
        ("POST", [part(b"x" * (LIMIT + 1)), LEFT], None),
        ("POST", [part(b"{", more_body=True), part(b"}"), LEFT], None),
        ("POST", [LEFT], None),
        ("GET", [part(b"{}"), LEFT], None),
    ],
)
async def test_what_rides_along(method: str, messages: list[dict[str, Any]], early: bytes | None):
    assert await through(method, messages) == (early, messages)
