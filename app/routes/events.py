"""The change log as server-sent events, for operators and the status page.

A client that names the last event it has seen (`Last-Event-ID`, or `?last_event_id=` where it cannot set a header)
goes on exactly behind it, at any ingress: the log is the ledger's. Any other begins with a snapshot.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse

from cluster import errors, sentences
from cluster.changes import Change, Changes
from cluster.client import LedgerClient
from cluster.ledger.snapshot import as_dict
from deployments.gateway import Gateway
from deployments.sse import comment

router = APIRouter(tags=["admin"])

#: A comment goes out when nothing has happened for so long, in seconds: proxies, and we, notice who has left.
QUIET_S = 15.0
#: Pause between two looks for a ledger that is being restarted, in seconds.
RETRY_S = 0.5
#: What is told without a sentence, for there is much of it.
SILENT = frozenset(("lease", "queue", "load"))
HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
#: So many may follow at one ingress: each parks a call in the ledger.
MAX_FOLLOWERS = 200


@dataclass
class _Followers:
    """How many follow at this ingress."""

    count: int = 0


_followers = _Followers()


@router.get("/events")
async def events(request: Request, last_event_id: str | None = None) -> Response:
    """Every change of the pool's state from now on, or from the last event that was seen."""
    gateway: Gateway = request.app.state.gateway
    check_followers()
    seen = request.headers.get("last-event-id") or last_event_id or ""
    return StreamingResponse(stream(gateway.ledger, seen), media_type="text/event-stream", headers=HEADERS)


def check_followers() -> None:
    """Raises `RateLimited` where one more would be too many."""
    if _followers.count >= MAX_FOLLOWERS:
        raise errors.RateLimited(f"{MAX_FOLLOWERS} clients follow already", retry_after=10)


async def follow(ledger: LedgerClient, epoch: str = "", version: int = 0) -> AsyncGenerator[Changes | None, None]:
    """What happens behind that version, call by call; None while the ledger is being restarted. Endless."""
    _followers.count += 1
    try:
        while True:
            try:
                found = await ledger.changes(epoch, version, QUIET_S)
            except errors.BackendUnavailable:
                yield None
                await asyncio.sleep(RETRY_S)
                continue
            yield found
            epoch, version = found.epoch, found.version
    finally:
        _followers.count -= 1


async def stream(ledger: LedgerClient, last_event_id: str) -> AsyncGenerator[bytes, None]:
    """The events behind `last_event_id`. Waits for the ledger, also for one that is being restarted. Endless.

    Nothing is kept for a client that reads slowly: it asks the log for more when it has read what it got.
    """
    epoch, version = seen_by(last_event_id)
    begins = not last_event_id
    async with contextlib.aclosing(follow(ledger, epoch, version)) as steps:
        async for found in steps:
            if found is None:
                yield comment("the scheduler is being restarted")
                continue
            if found.snapshot is not None:
                if not begins:
                    reason = "epoch" if epoch != found.epoch else "too_old"
                    # Without an id: who is cut off behind it asks again with the old one, and gets it again.
                    yield _event("reset", {"reason": reason})
                yield _snapshot(found)
            elif found.changes:
                yield b"".join(_change(found.epoch, change) for change in found.changes)
            else:
                yield comment("nothing happened")
            epoch, begins = found.epoch, False


def seen_by(last_event_id: str) -> tuple[str, int]:
    """The life of the ledger and the entry that an event's id names; what is none names nothing."""
    epoch, _, version = last_event_id.rpartition("-")
    # No id of ours is longer, and Python refuses to read numbers of thousands of digits.
    return (epoch, int(version)) if epoch and version.isascii() and version.isdigit() and len(version) < 20 else ("", 0)


def _snapshot(found: Changes) -> bytes:
    assert found.snapshot is not None, "a new beginning has a snapshot"
    told = {**as_dict(found.snapshot), "recent": [_plain(each) for each in found.recent]}
    return _event("snapshot", told, f"{found.epoch}-{found.version}")


def _change(epoch: str, change: Change) -> bytes:
    return _event(change.kind, _plain(change), f"{epoch}-{change.version}")


def _plain(change: Change) -> dict[str, Any]:
    """An entry with what it says, and why, in words. Counts that moved speak for themselves."""
    plain = change._asdict()
    if change.kind in SILENT:
        return plain
    data = change.data
    because = sentences.why(data.get("because"), str(data.get("reason") or ""))
    return {**plain, "text": sentences.of_change(plain), "why": because}


def _event(kind: str, data: dict[str, Any], event_id: str | None = None) -> bytes:
    head = f"id: {event_id}\n" if event_id is not None else ""
    return f"{head}event: {kind}\ndata: {json.dumps(data)}\n\n".encode()
