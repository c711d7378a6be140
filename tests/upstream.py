"""A small OpenAI-compatible server that watches how it is used: the external server of tests, and their fault injector.

It runs in a thread of its own, with real HTTP. It answers `MODEL:0 MODEL:1 …` and notes how many requests run at the
same time and of which models; a model that arrives while another one runs is a crime on a server that loads just in
time, and is noted as such.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import uvicorn


class Upstream:
    """What the server does may be changed at any time; what it saw may be read at any time.

    `fault`: `cut` closes the connection in the middle of an event, `hang` stops in mid-stream, `garbage` answers
    nonsense, `deaf` takes a connection and says nothing; a number is the status of every answer. Who asks for more than
    `most_tokens` is refused with 400, as vLLM does where they do not fit.
    """

    def __init__(self, *models: str, tokens: int = 5, gap_s: float = 0.0) -> None:
        self.models = list(models)
        self.tokens = tokens
        self.gap_s = gap_s
        self.fault: str | int | None = None
        self.most_tokens: int | None = None
        self.manifest_fault: str | int | None = None
        self.running: Counter[str] = Counter()
        self.peak = 0
        self.mixed: list[str] = []
        self.served: list[str] = []
        self.aborted = 0
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.clients: set[int] = set()
        self.paths: list[str] = []
        self.port = 0
        self.release = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    # --- the server ---------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def listening(self) -> Iterator[Upstream]:
        """Serve in a thread, on the same port as before if there was one."""
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        self.port = listener.getsockname()[1]
        config = uvicorn.Config(
            self._app, interface="asgi3", log_level="critical", lifespan="off", timeout_graceful_shutdown=1
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        deadline = time.monotonic() + 10
        while not server.started:
            assert time.monotonic() < deadline, "the upstream did not start"
            time.sleep(0.005)
        try:
            yield self
        finally:
            server.should_exit = True
            thread.join(10)
            listener.close()

    async def _app(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        headers = dict(scope["headers"])
        # The port that a client's connection comes from tells connections apart.
        self.clients.add(scope["client"][1])
        self.keys.append(headers.get(b"authorization", b"").decode() or None)
        if scope["path"] == "/v1/models":
            await self._manifest(send)
            return
        if scope["path"].startswith("/echo"):
            await self._echo(scope, body, send)
            return
        if scope["path"].startswith(("/v1/rerank", "/v1/score", "/v1/audio/")):
            await _other(scope, body, send)
            return
        request = json.loads(body)
        self.paths.append(scope["path"])
        self.bodies.append(request)
        work = asyncio.create_task(self._answer(request, send))
        leaving = asyncio.create_task(receive())
        await asyncio.wait([work, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            self.aborted += 1
            work.cancel()
        leaving.cancel()
        await asyncio.wait([work, leaving])
        if not work.cancelled():
            work.result()

    async def _manifest(self, send: Any) -> None:
        fault = self.manifest_fault
        if fault == "deaf":
            await asyncio.Event().wait()
        if isinstance(fault, int):
            await _reply(send, fault, {"error": {"message": "no"}})
        elif fault == "garbage":
            await _reply(send, 200, ["what?"])
        elif fault == "nameless":
            await _reply(send, 200, {"data": [{"id": 7}]})
        else:
            await _reply(
                send, 200, {"object": "list", "data": [{"id": name, "object": "model"} for name in self.models]}
            )

    async def _echo(self, scope: dict[str, Any], body: bytes, send: Any) -> None:
        """What has come, as headers of status 418, and the body in two parts; the second one waits for `release`."""
        told = {"method": scope["method"], "path": scope["path"], "query": scope["query_string"].decode()}
        told |= {f"header-{name.decode()}": value.decode() for name, value in scope["headers"]}
        headers = [(f"x-seen-{name}".encode(), value.encode()) for name, value in told.items()]
        await send({"type": "http.response.start", "status": 418, "headers": [(b"content-type", b"image/x"), *headers]})
        await send({"type": "http.response.body", "body": body[:1], "more_body": True})
        while not self.release.is_set():
            await asyncio.sleep(0.01)
        await send({"type": "http.response.body", "body": body[1:]})

    async def _answer(self, request: dict[str, Any], send: Any) -> None:
        model = request["model"]
        others = [name for name, count in self.running.items() if count and name != model]
        if others:
            self.mixed.append(f"{model} while {others} ran")
        self.running[model] += 1
        self.peak = max(self.peak, sum(self.running.values()))
        try:
            if self.fault == "deaf":
                await asyncio.Event().wait()
            fault = self.fault
            if self.most_tokens is not None and request.get("max_tokens", 0) > self.most_tokens:
                fault = 400
            if isinstance(fault, int):
                await _reply(send, fault, {"error": {"message": f"upstream says {fault}"}})
            elif self.fault == "garbage":
                await _reply(send, 200, None)
            elif request.get("stream"):
                await self._stream(model, send)
            else:
                await asyncio.sleep(self.tokens * self.gap_s)
                text = "".join(f"{model}:{index} " for index in range(self.tokens))
                await _reply(
                    send,
                    200,
                    {
                        "id": "u1",
                        "object": "chat.completion",
                        "model": model,
                        "choices": [
                            {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
                        ],
                    },
                )
            self.served.append(model)
        finally:
            self.running[model] -= 1

    async def _stream(self, model: str, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        for index in range(self.tokens):
            finish = "stop" if index == self.tokens - 1 else None
            chunk = {
                "id": "u1",
                "object": "chat.completion.chunk",
                "model": model,
                "choices": [{"index": 0, "delta": {"content": f"{model}:{index} "}, "finish_reason": finish}],
            }
            event = b"data: " + json.dumps(chunk).encode() + b"\n\n"
            if index == self.tokens // 2:
                if self.fault == "cut":
                    await send({"type": "http.response.body", "body": event[: len(event) // 2], "more_body": True})
                    raise ConnectionResetError("cut on purpose")
                if self.fault == "hang":
                    await asyncio.Event().wait()
            await send({"type": "http.response.body", "body": event, "more_body": True})
            await asyncio.sleep(self.gap_s)
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})


async def _other(scope: dict[str, Any], body: bytes, send: Any) -> None:
    """What servers have beside chat: documents ranked or scored by their length, speech, and the length of a sound."""
    if scope["path"] == "/v1/audio/transcriptions":
        await _reply(send, 200, {"text": f"{len(body)} bytes"})
        return
    request = json.loads(body)
    if scope["path"] == "/v1/audio/speech":
        head = [(b"content-type", b"audio/wav")]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        await send({"type": "http.response.body", "body": b"RIFF\x00\xff" + request["input"].encode()})
        return
    scores = [float(len(each)) for each in request.get("documents") or request["text_2"]]
    if scope["path"] == "/v1/score":
        await _reply(send, 200, {"data": [{"index": index, "score": score} for index, score in enumerate(scores)]})
        return
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    await _reply(send, 200, {"results": [{"index": each, "relevance_score": scores[each]} for each in order]})


async def _reply(send: Any, status: int, body: Any) -> None:
    data = b"<html>" if body is None else json.dumps(body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": data})
