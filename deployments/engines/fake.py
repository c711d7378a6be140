"""An engine without a model, for trying policies and injecting faults: known words at a known speed.

It emits `ID:0 ID:1 ID:2 …`, one word a token, so that a test can see from the text alone which model answered and
that nothing is missing. Each choice of each prompt is a sequence that says the same; as many run at a time as the call
has slots. A word is a token in prompts, too, whose id is its checksum, and an embedding is drawn from its input's. Two
raw paths tell what a call met: `GET /fake/environment` (the process's id and its devices) and `POST /fake/echo` (the
body as it came). Stop strings end an answer; what would need a model (a schema, a call, log-probabilities) is refused.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import random
import struct
import time
import zlib
from collections.abc import AsyncGenerator, Iterator
from typing import Any

from cluster.config import FakeFaults
from cluster.errors import (
    BackendUnavailable,
    InvalidRequest,
    ModelUnavailable,
    RateLimited,
    UnsupportedParameter,
)
from deployments.engines.chat.metrics import metrics_object
from deployments.engines.chat.stops import StopScanner
from deployments.engines.protocol import EVENT_STREAM, JSON, Call, EngineInfo, Kept, Progress, Reply, Report, once
from deployments.schemas import CHAT, DETOKENIZE, EMBEDDINGS, PATHS, TOKENIZE, prompts_of
from deployments.sse import DONE

ENVIRONMENT, ECHO = "/fake/environment", "/fake/echo"
#: Environment variables that `GET /fake/environment` shows; never all of them, since some hold keys.
SHOWN = ("CUDA_VISIBLE_DEVICES",)
EMBEDDING_SIZE, MAX_EMBEDDING_SIZE = 8, 4096
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
        return EngineInfo(paths=PATHS, format="fake")

    async def call(self, call: Call) -> Reply:
        if (call.method, call.path) == ("GET", ENVIRONMENT):
            shown = {"pid": os.getpid(), **{name: os.environ.get(name) for name in SHOWN}}
            return Reply(200, dict(JSON), once(json.dumps(shown).encode()))
        if (call.method, call.path) == ("POST", ECHO):
            body = call.body if isinstance(call.body, bytes) else json.dumps(call.body).encode()
            kind = call.headers.get("content-type", "application/octet-stream")
            return Reply(200, {"content-type": kind}, once(body))
        if call.path not in PATHS:
            raise InvalidRequest(f"this model does not serve {call.path}")
        if self._faults.fault == "rate_limited":
            raise RateLimited(f"{self._id} is rate limited, as configured", retry_after=1)
        if call.path in (TOKENIZE, DETOKENIZE):
            return Reply(200, dict(JSON), once(json.dumps(_tokens(call)).encode()))
        if call.path == EMBEDDINGS:
            return Reply(200, dict(JSON), once(json.dumps(_embeddings(call)).encode()))
        _refuse_what_needs_a_model(call.json)
        report = Report(prompt_tokens=_prompt_tokens(call.json), cached_tokens=0, output_tokens=0)
        chunks = self._answer(call, report)
        return Reply(200, dict(EVENT_STREAM if call.stream else JSON), chunks, report)

    async def sleep(self) -> Kept:
        return Kept(0, 0)

    async def wake(self, progress: Progress) -> None:
        await asyncio.sleep(self._faults.wake_s)
        if self._faults.fault == "wake_fails":
            raise ModelUnavailable(f"{self._id} fails to wake, as configured")
        progress(1.0)

    async def unload(self) -> None:
        pass

    async def _answer(self, call: Call, report: Report) -> AsyncGenerator[bytes, None]:
        started = time.monotonic()
        words = self._stream(call, report, started) if call.stream else self._whole(call, report, started)
        try:
            async for chunk in words:
                yield chunk
        finally:
            await words.aclose()
            report.total_ms = (time.monotonic() - started) * 1e3

    async def _whole(self, call: Call, report: Report, started: float) -> AsyncGenerator[bytes, None]:
        said, turns = list(self._said(call.json)), _turns(call)
        await asyncio.sleep(self._faults.ttft_s)
        report.ttft_ms = (time.monotonic() - started) * 1e3
        await asyncio.sleep(len(turns) * len(said) / self._faults.tokens_per_s)
        self._fail_at(0, 0)
        report.output_tokens = turns[-1].stop * len(said)
        report.total_ms = (time.monotonic() - started) * 1e3
        text, finish = "".join(piece for piece, _ in said), said[-1][1]
        yield json.dumps(self._body(call, text, finish, report)).encode()

    async def _stream(self, call: Call, report: Report, started: float) -> AsyncGenerator[bytes, None]:
        count = self._length(call.json)
        await asyncio.sleep(self._faults.ttft_s)
        report.ttft_ms = (time.monotonic() - started) * 1e3
        steps = made = 0
        for turn in _turns(call):
            finish = None
            for index, (piece, end) in enumerate(self._said(call.json)):
                finish = end
                self._fail_at(index, count // 2)
                if self._faults.fault == "hang_mid_stream" and index == count // 2:
                    await asyncio.Event().wait()
                broken = self._faults.fault == "malformed" and index == count // 2
                report.output_tokens = made + len(turn) * (index + 1)
                if broken or piece:
                    yield b"data: {broken\n\n" if broken else b"".join(self._chunk(call, each, piece) for each in turn)
                steps += 1
                await asyncio.sleep(
                    max(0.0, started + self._faults.ttft_s + steps / self._faults.tokens_per_s - time.monotonic())
                )
            made = report.output_tokens or 0
            report.total_ms = (time.monotonic() - started) * 1e3
            for each in turn:
                last = each == turn[-1] and turn.stop == _sequences(call.json)
                yield self._chunk(call, each, "", finish, report if last else None)
        yield DONE

    def _length(self, body: dict[str, Any]) -> int:
        return int(body.get("max_completion_tokens") or body.get("max_tokens") or self._faults.tokens)

    def _finish(self, count: int) -> str:
        return "stop" if count == self._faults.tokens else "length"

    def _said(self, body: dict[str, Any]) -> Iterator[tuple[str, str | None]]:
        """What each token of an answer shows, and at the last one why it ends there."""
        count = self._length(body)
        stop = body.get("stop") or ()
        scanner = StopScanner((stop,) if isinstance(stop, str) else stop)
        for index in range(count):
            text = scanner.push(f"{self._id}:{index} ")
            if scanner.stopped_by is not None:
                yield text, "stop"
                return
            yield (text, None) if index < count - 1 else (text + scanner.flush(), self._finish(count))

    def _fail_at(self, index: int, where: int) -> None:
        if index != where:
            return
        if self._faults.fault == "cut_mid_stream":
            raise BackendUnavailable(f"{self._id} cuts the stream, as configured")
        if self._faults.fault == "dies_after":
            os._exit(1)

    def _usage(self, report: Report) -> dict[str, int]:
        prompt, output = report.prompt_tokens or 0, report.output_tokens or 0
        return {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}

    def _head(self, call: Call, kind: str) -> dict[str, Any]:
        return {"id": call.request_id, "object": kind, "created": int(time.time()), "model": call.json.get("model")}

    def _chunk(
        self, call: Call, index: int, text: str, finish: str | None = None, report: Report | None = None
    ) -> bytes:
        choice: dict[str, Any] = {"index": index, "finish_reason": finish}
        if call.path == CHAT:
            choice["delta"] = {"role": "assistant", "content": text} if text else {}
            chunk = self._head(call, "chat.completion.chunk")
        else:
            choice["text"] = text
            chunk = self._head(call, "text_completion")
        chunk["choices"] = [choice]
        if report is not None:
            chunk["metrics"] = metrics_object(call, report)
            if (call.json.get("stream_options") or {}).get("include_usage"):
                chunk["usage"] = self._usage(report)
        return b"data: " + json.dumps(chunk).encode() + b"\n\n"

    def _body(self, call: Call, text: str, finish: str | None, report: Report) -> dict[str, Any]:
        is_chat = call.path == CHAT
        said: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if is_chat else {"text": text}
        choices = [{"index": index, "finish_reason": finish, **said} for index in range(_sequences(call.json))]
        head = self._head(call, "chat.completion" if is_chat else "text_completion")
        return {**head, "choices": choices, "usage": self._usage(report), "metrics": metrics_object(call, report)}


def _refuse_what_needs_a_model(body: dict[str, Any]) -> None:
    """Raises `UnsupportedParameter` for a field that known words cannot obey."""
    needs = {
        "response_format": (body.get("response_format") or {}).get("type", "text") != "text",
        "grammar": body.get("grammar") is not None,
        "tool_choice": body.get("tool_choice") not in (None, "none", "auto"),
        "logprobs": body.get("logprobs") not in (None, False),
    }
    for name, is_asked in needs.items():
        if is_asked:
            raise UnsupportedParameter(f"{name} is not supported by this engine, which has no model", param=name)


def _prompt_tokens(body: dict[str, Any]) -> int:
    """The words of all prompts, or of the whole chat; a prompt without any is one token, as for a real model."""
    given = prompts_of(body.get("prompt") or "")
    chat = [str(message.get("content") or "") for message in body.get("messages") or ()]
    texts = [" ".join(chat)] if chat else given
    return sum(max(1, len(text.split()) if isinstance(text, str) else len(text)) for text in texts)


def _sequences(body: dict[str, Any]) -> int:
    return (body.get("n") or 1) * len(prompts_of(body.get("prompt") or ""))


def _turns(call: Call) -> list[range]:
    """The sequences of a call, as many at a time as it has slots."""
    total = _sequences(call.json)
    return [range(first, min(first + call.slots, total)) for first in range(0, total, call.slots)]


def _tokens(call: Call) -> dict[str, Any]:
    if call.path == DETOKENIZE:
        text = " ".join(map(str, call.json["tokens"]))
        return {"content": text, "prompt": text}
    body = call.json
    texts = [body.get("content") or body.get("prompt") or ""]
    texts += [str(message.get("content") or "") for message in body.get("messages") or ()]
    tokens = [zlib.crc32(word.encode()) for text in texts for word in text.split()]
    return {"tokens": tokens, "count": len(tokens), "max_model_len": None}


def _embeddings(call: Call) -> dict[str, Any]:
    given = prompts_of(call.json["input"])
    in_base64 = call.json.get("encoding_format") == "base64"
    size = call.json.get("dimensions") or EMBEDDING_SIZE
    if size > MAX_EMBEDDING_SIZE:
        raise UnsupportedParameter(f"embeddings have at most {MAX_EMBEDDING_SIZE} dimensions", param="dimensions")
    data = []
    for index, one in enumerate(given):
        drawn = random.Random(json.dumps(one))
        vector = [drawn.gauss(0.0, 1.0) for _ in range(size)]
        packed = base64.b64encode(struct.pack(f"<{size}f", *vector)).decode()
        data.append({"object": "embedding", "index": index, "embedding": packed if in_base64 else vector})
    tokens = sum(len(one.split()) if isinstance(one, str) else len(one) for one in given)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": call.json.get("model"), "usage": usage}
