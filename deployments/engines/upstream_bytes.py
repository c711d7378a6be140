"""What an external server sends, made into whole events and bodies of bounded size. Pure, but for `one_body`'s thread.

Event streams may end their lines with LF, CRLF or CR, and be cut anywhere; what comes out has LF only, so that nobody
behind this needs to know.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

MIB = 1 << 20
MAX_EVENT = MIB
MAX_BODY = 64 * MIB
#: A body larger than this is parsed in a thread.
INLINE_BODY = MIB


class Unreadable(Exception):
    """The server sent something that is no answer; the message says what."""


class EventSplitter:
    """Gives back whole events as their bytes come in. Raises `Unreadable` for one that never ends."""

    def __init__(self) -> None:
        self._rest = bytearray()
        self._after_cr = False

    def push(self, part: bytes) -> bytes:
        """All events that are whole now; empty while there is none."""
        if self._after_cr and part:
            # The second half of a CRLF whose first half has ended the line already.
            part = part.removeprefix(b"\n")
            self._after_cr = False
        if b"\r" in part:
            self._after_cr = part.endswith(b"\r")
            part = part.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        # A blank line may begin with the last byte that was there; before it there is none.
        start = max(0, len(self._rest) - 1)
        self._rest += part
        at = self._rest.rfind(b"\n\n", start)
        events = bytes(self._rest[: at + 2]) if at >= 0 else b""
        del self._rest[: len(events)]
        if len(self._rest) > MAX_EVENT:
            raise Unreadable(f"an event is larger than {MAX_EVENT // MIB} MiB")
        return events

    def finish(self) -> bytes:
        """The last event, which may have no blank line behind it; with one, it is whole for everybody."""
        rest = bytes(self._rest).rstrip()
        self._rest.clear()
        return rest + b"\n\n" if rest else b""


async def one_body(parts: AsyncIterator[bytes]) -> tuple[bytes, dict[str, Any]]:
    """The whole body, and the JSON object that it is. Raises `Unreadable` where it is none, or too large."""
    body = bytearray()
    async for part in parts:
        body += part
        if len(body) > MAX_BODY:
            raise Unreadable(f"its answer is larger than {MAX_BODY // MIB} MiB")
    try:
        parsed = json.loads(body) if len(body) <= INLINE_BODY else await asyncio.to_thread(json.loads, body)
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise Unreadable("its answer is not a JSON object")
    return bytes(body), parsed
