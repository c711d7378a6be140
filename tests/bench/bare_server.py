"""Bare uvicorn in front of the fake engine: what a server costs that schedules nothing. For `bench_path.py`."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import uvicorn

sys.path.insert(0, str(Path(__file__).parents[2]))

from cluster.config import FakeFaults
from deployments.engines.fake import FakeEngine
from deployments.engines.protocol import Call


async def serve(port: int, models: dict[str, dict[str, Any]]) -> None:
    """Serve the fake models until the process is told to end."""
    engines = {name: FakeEngine(name, FakeFaults(**keys)) for name, keys in models.items()}
    for engine in engines.values():
        await engine.load(lambda part: None)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        parsed = json.loads(body)
        call = Call(path=scope["path"], body=parsed, request_id="bare")
        reply = await engines[parsed["model"]].call(call)
        headers = [(name.encode(), value.encode()) for name, value in reply.headers.items()]
        await send({"type": "http.response.start", "status": reply.status, "headers": headers})
        async for chunk in reply.chunks:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    config = uvicorn.Config(app, host="127.0.0.1", port=port, lifespan="off", access_log=False, log_level="warning")
    await uvicorn.Server(config).serve()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1]), json.loads(sys.argv[2])))
