"""A gateway that answers by a script, behind the real HTTP application: what a family's routes do, without Ray."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from typing import Any, cast

import httpx

from app.http import build_http
from cluster.config import load_config
from cluster.errors import PoolError
from cluster.request import Request
from deployments.engines.protocol import Call, Report
from deployments.limits import Limits
from deployments.run_info import RunInfo
from deployments.sse import DONE, error_event

QUEUED = b": queued position=2\n\n"
LOADING = b": loading model=m 40%\n\n"


def chunk(delta: dict[str, Any] | None = None, finish: str | None = None, **members: Any) -> bytes:
    """One event of a chat stream."""
    choices = [{"index": 0, "delta": delta or {}, "finish_reason": finish}]
    return b"data: " + json.dumps({"object": "chat.completion.chunk", "choices": choices, **members}).encode() + b"\n\n"


def said(*words: str, finish: str = "stop") -> list[bytes]:
    """A whole chat stream of some words."""
    usage = {"prompt_tokens": 3, "completion_tokens": len(words), "total_tokens": 3 + len(words)}
    last = b'data: {"choices":[],"usage":' + json.dumps(usage).encode() + b"}\n\n" + DONE
    return [*(chunk({"content": word}) for word in words), chunk(finish=finish), last]


class Scripted:
    """Stands for a `Gateway`. Each request takes the next script: chunks, or an error that is raised in its place."""

    def __init__(self, *scripts: list[bytes | PoolError], args: dict[str, Any] | None = None) -> None:
        self.config = load_config(args or {"models": {"m": {"backend": "fake"}}}, environ={})
        self.limits = Limits()
        self.scripts = list(scripts)
        self.requests: list[tuple[Request, dict[str, Any]]] = []
        self.closed = 0

    def stream(
        self, request: Request, body: dict[str, Any], info: RunInfo | None = None
    ) -> AsyncGenerator[bytes, None]:
        return self._stream(request, body, info or RunInfo())

    async def _stream(self, request: Request, body: dict[str, Any], info: RunInfo) -> AsyncGenerator[bytes, None]:
        self.requests.append((request, body))
        info.call = Call(request.path, body, request.trace)
        begun = False
        try:
            for step in self.scripts.pop(0):
                if isinstance(step, PoolError):
                    if not begun:
                        raise step
                    info.failure = step
                    yield error_event(step)
                    return
                begun = True
                yield step
            info.report = Report(prompt_tokens=3, cached_tokens=1, output_tokens=2, ttft_ms=5.0, total_ms=9.0)
        finally:
            self.closed += 1

    def http(self) -> httpx.AsyncClient:
        """A client of the HTTP application around this gateway."""
        transport = httpx.ASGITransport(build_http(cast(Any, self)), client=("127.0.0.1", 5))
        return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000")


def events(text: str) -> list[dict[str, Any]]:
    """The parsed events of an SSE body, without comments and `[DONE]`."""
    datas = [part.partition("data: ")[2] for part in text.split("\n\n") if "data: " in part]
    return [json.loads(data) for data in datas if data != "[DONE]"]
