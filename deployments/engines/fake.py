"""An engine without a model, for trying policies and injecting faults: known words at a known speed.

It emits `ID:0 ID:1 ID:2 …`, one word a token, so that a test can see from the text alone which model answered and
that nothing is missing.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from cluster.config import FakeFaults
from cluster.errors import BackendUnavailable, ModelUnavailable, RateLimited
from deployments.engines.protocol import Call, EngineInfo, Progress
from deployments.sse import DONE

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_LOAD_STEPS = 10


class FakeEngine:
    """`backend: fake`; what it does wrong, and when, stands in `engine_kwargs`."""

    def __init__(self, model_id: str, faults: FakeFaults) -> None:
        self._id = model_id
        self._faults = faults

    async def load(self, progress: Progress) -> None:
        if self._faults.fault == "load_hangs":
            await asyncio.Event().wait()
        for step in range(_LOAD_STEPS):
            progress(step / _LOAD_STEPS)
            await asyncio.sleep(self._faults.load_s / _LOAD_STEPS)
        if self._faults.fault == "load_fails":
            raise ModelUnavailable(f"{self._id} fails to load, as configured")
        progress(1.0)

    def info(self) -> EngineInfo:
        return EngineInfo(paths=frozenset({CHAT, COMPLETIONS}), format="fake")

    async def generate(self, call: Call) -> AsyncIterator[bytes]:
        if self._faults.fault == "rate_limited":
            raise RateLimited(f"{self._id} is rate limited, as configured", retry_after=1)
        count = self._length(call.body)
        started = time.monotonic()
        await asyncio.sleep(self._faults.ttft_s)
        if not call.stream:
            await asyncio.sleep(count / self._faults.tokens_per_s)
            self._fail_at(0, 0)
            yield json.dumps(self._body(call, count)).encode()
            return
        for index in range(count):
            self._fail_at(index, count // 2)
            if self._faults.fault == "hang_mid_stream" and index == count // 2:
                await asyncio.Event().wait()
            broken = self._faults.fault == "malformed" and index == count // 2
            yield b"data: {broken\n\n" if broken else self._chunk(call, self._word(index), None)
            await asyncio.sleep(
                max(0.0, started + self._faults.ttft_s + (index + 1) / self._faults.tokens_per_s - time.monotonic())
            )
        yield self._chunk(call, "", "stop" if count == self._faults.tokens else "length", count)
        yield DONE

    async def unload(self) -> None:
        pass

    def _length(self, body: dict[str, Any]) -> int:
        return int(body.get("max_completion_tokens") or body.get("max_tokens") or self._faults.tokens)

    def _word(self, index: int) -> str:
        return f"{self._id}:{index} "

    def _fail_at(self, index: int, where: int) -> None:
        if self._faults.fault == "cut_mid_stream" and index == where:
            raise BackendUnavailable(f"{self._id} cuts the stream, as configured")

    def _usage(self, count: int) -> dict[str, int]:
        return {"prompt_tokens": 1, "completion_tokens": count, "total_tokens": count + 1}

    def _head(self, call: Call, kind: str) -> dict[str, Any]:
        return {"id": call.request_id, "object": kind, "created": int(time.time()), "model": call.body.get("model")}

    def _chunk(self, call: Call, text: str, finish: str | None, count: int = 0) -> bytes:
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish}
        if call.path == CHAT:
            choice["delta"] = {"role": "assistant", "content": text} if text else {}
            chunk = self._head(call, "chat.completion.chunk")
        else:
            choice["text"] = text
            chunk = self._head(call, "text_completion")
        chunk["choices"] = [choice]
        if finish and (call.body.get("stream_options") or {}).get("include_usage"):
            chunk["usage"] = self._usage(count)
        return b"data: " + json.dumps(chunk).encode() + b"\n\n"

    def _body(self, call: Call, count: int) -> dict[str, Any]:
        text = "".join(self._word(index) for index in range(count))
        choice: dict[str, Any] = {"index": 0, "finish_reason": "length"}
        if call.path == CHAT:
            body = self._head(call, "chat.completion")
            choice["message"] = {"role": "assistant", "content": text}
        else:
            body = self._head(call, "text_completion")
            choice["text"] = text
        return {**body, "choices": [choice], "usage": self._usage(count)}
