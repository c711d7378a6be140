"""The Serve deployment at the front: it owns the gateway, hosts the HTTP application, and is the Python handle."""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import AsyncGenerator, Callable
from typing import Any

from ray.serve.handle import DeploymentHandle

from cluster import errors
from cluster.config import PoolConfig
from cluster.config.version import Configuration
from cluster.request import Request
from deployments.gateway import Gateway
from deployments.public_port import reuse_public_port
from deployments.requests import CHAT, parse_request


class Ingress:
    """`serve.get_app_handle("slotpool")` is a handle of this class; `chat` and `chat_stream` are for other Ray jobs.

    `build_http` makes the ASGI application around the gateway; it comes from outside, since the front door's rooms
    lie above this one.
    """

    async def __init__(  # type: ignore[misc]
        self, configuration: Configuration, build_http: Callable[[Gateway], Any], **handles: DeploymentHandle
    ) -> None:
        reuse_public_port()
        self._build_http = build_http
        self._gateway = Gateway(
            configuration, {model: handles[key] for model, key in handle_keys(configuration.pool).items()}
        )

    def __serve_build_asgi_app__(self) -> Any:
        return self._build_http(self._gateway)

    async def chat(self, body: dict[str, Any]) -> dict[str, Any]:
        """Run one chat and return the OpenAI `chat.completion` object.

        `body` is a `/v1/chat/completions` body. Raises the `PoolError` that HTTP would have answered.
        """
        request, checked = self._parse({**body, "stream": False})
        async with contextlib.aclosing(self._gateway.stream(request, checked)) as chunks:
            return json.loads(b"".join([chunk async for chunk in chunks]))  # type: ignore[no-any-return]

    async def chat_stream(self, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """Run one chat and yield OpenAI `chat.completion.chunk` objects; call it with `options(stream=True)`.

        Raises the `PoolError` that HTTP would have answered, also for a failure in mid-stream.
        """
        request, checked = self._parse({**body, "stream": True})
        async with contextlib.aclosing(self._gateway.stream(request, checked)) as chunks:
            async for chunk in chunks:
                for event in chunk.split(b"\n\n"):
                    if event.startswith(b"data: {"):
                        yield _chunk(event[6:])

    def _parse(self, body: dict[str, Any]) -> tuple[Request, dict[str, Any]]:
        return parse_request(self._gateway.config, CHAT, body, request_id=uuid.uuid4().hex)


def handle_keys(config: PoolConfig) -> dict[str, str]:
    """The keyword under which each model's handle is bound: ids need not be Python names."""
    return {model: f"model_{index}" for index, model in enumerate(config.models)}


def _chunk(data: bytes) -> dict[str, Any]:
    chunk: dict[str, Any] = json.loads(data)
    if "error" in chunk:
        error = chunk["error"]
        raise errors.BackendUnavailable(error["message"], code=error["code"])
    return chunk
