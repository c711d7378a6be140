"""The Serve deployment at the front: it owns the gateway, hosts the HTTP application, and is the Python handle."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, NamedTuple

from cluster.config import PoolConfig
from cluster.config.version import Configuration
from deployments import python_calls
from deployments.applications import Applications
from deployments.gateway import Gateway
from deployments.handles import Handles
from deployments.public_port import reuse_public_port
from deployments.requests import CHAT
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

    Those that want types, leases, and their slots back when they die have `deployments.pool_handle`.

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
        return await python_calls.whole(self._gateway, CHAT, body)

    async def chat_stream(self, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """Run one chat and yield OpenAI `chat.completion.chunk` objects; call it with `options(stream=True)`.

        Raises the `PoolError` that HTTP would have answered, also for a failure in mid-stream.
        """
        async with contextlib.aclosing(python_calls.streamed(self._gateway, CHAT, body)) as chunks:
            async for chunk in chunks:
                for event in python_calls.events_of(chunk):
                    yield event
