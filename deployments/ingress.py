"""The Serve deployment at the front: it owns the gateway, hosts the HTTP application, and is the Python handle."""

from __future__ import annotations

import asyncio
import contextlib
import json
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, NamedTuple

from cluster import errors
from cluster.config import PoolConfig
from cluster.config.version import Configuration
from cluster.request import Request
from deployments.applications import Applications
from deployments.gateway import Gateway
from deployments.handles import Handles
from deployments.public_port import reuse_public_port
from deployments.requests import CHAT, parse_request
from deployments.runtime_models import RuntimeModels


class Building(NamedTuple):
    """What the ingress is given by the rooms that lie above this one.

    `http` makes the ASGI application around the gateway, `application` the Serve application of a model, `estimated`
    adds to a configuration what its models' files say. `source` is the path of the configuration's file, if it has one.
    """

    http: Callable[[Gateway], Any]
    application: Callable[[PoolConfig, str], Any]
    estimated: Callable[[PoolConfig], PoolConfig]
    source: str | None


class Ingress:
    """`serve.get_app_handle("slotpool")` is a handle of this class; `chat` and `chat_stream` are for other Ray jobs.

    `models` are the graph's deployments, bound here so that Serve makes them, and never touched (see `Handles`).
    """

    async def __init__(  # type: ignore[misc]
        self, configuration: Configuration, building: Building, models: Sequence[Any]
    ) -> None:
        reuse_public_port()
        self._building = building
        handles = Handles(configuration)
        self._gateway = Gateway(configuration, handles)
        applications = Applications(self._gateway.ledger, building.application)
        self._gateway.on_configuration = [handles.follow, lambda _: applications.changed()]
        self._runtime = RuntimeModels(self._gateway.ledger, applications, building.estimated, building.source)
        self._life = asyncio.create_task(applications.follow())

    def __serve_build_asgi_app__(self) -> Any:
        app = self._building.http(self._gateway)
        app.state.runtime = self._runtime
        return app

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


def _chunk(data: bytes) -> dict[str, Any]:
    chunk: dict[str, Any] = json.loads(data)
    if "error" in chunk:
        error = chunk["error"]
        raise errors.BackendUnavailable(error["message"], code=error["code"])
    return chunk
