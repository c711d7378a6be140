"""llama.cpp's router family: the discovery and control calls that editors and chat pages make of a llama-server.

Load and unload are an operator's (`app.auth.ADMIN_PATHS`). A load begins and is not waited for, as there.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncGenerator, Callable
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict

from app.auth import caller_of
from app.routes.admin import body_of, known_model
from app.routes.admin_models import runtime_of
from app.routes.admin_rows import NOTHING
from app.routes.events import HEADERS, check_followers, follow
from app.routes.openai import visible_models
from cluster.changes import Change
from cluster.client import LedgerClient
from cluster.config import ModelConfig
from cluster.ledger.snapshot import ModelRow
from deployments.gateway import Gateway
from deployments.requests import is_allowed
from deployments.sse import comment

router = APIRouter(tags=["llama.cpp router"])

#: The pool's states in llama-server's words; it knows no end that takes time.
VALUES = {"loaded": "loaded", "loading": "loading", "sleeping": "sleeping"}


class Named(BaseModel):
    """The body of a load or unload."""

    model_config = ConfigDict(strict=True)

    model: str


@router.get("/models")
async def models(request: Request) -> Response:
    """Every model, with `status.value`: unloaded, loading, loaded or sleeping."""
    gateway: Gateway = request.app.state.gateway
    config, ledger = gateway.config, await gateway.ledger.status()
    listed = visible_models(config, ledger, caller_of(request))
    rows = [row(name, config.models.get(name), ledger.models.get(name, NOTHING)) for name in listed]
    return JSONResponse({"object": "list", "data": rows})


@router.post("/models/load")
async def load(request: Request) -> Response:
    """Begin to load a model; `GET /models` and `/models/sse` tell how it goes."""
    gateway: Gateway = request.app.state.gateway
    name = known_model(gateway, (await body_of(request, Named)).model)
    runtime_of(request).load_in_background(name, max(1, gateway.config.models[name].min_replicas))
    return JSONResponse({"success": True})


@router.post("/models/unload")
async def unload(request: Request) -> Response:
    """Let a model's running requests finish, unload it, and wait for the end of it."""
    gateway: Gateway = request.app.state.gateway
    await gateway.ledger.unload(known_model(gateway, (await body_of(request, Named)).model))
    return JSONResponse({"success": True})


@router.get("/models/sse")
async def sse(request: Request) -> Response:
    """What becomes of the models from now on."""
    gateway: Gateway = request.app.state.gateway
    check_followers()
    caller = caller_of(request)
    events = stream(gateway.ledger, lambda name: is_allowed(gateway.config, caller, name))
    return StreamingResponse(events, media_type="text/event-stream", headers=HEADERS)


def row(name: str, model: ModelConfig | None, state: ModelRow) -> dict[str, Any]:
    """One row of the list."""
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": "slotpool" if model is not None else "server",
        "aliases": list(model.aliases) if model is not None else [],
        "status": status(state.state),
        "architecture": {"input_modalities": ["text"], "output_modalities": ["text"]},
    }


def status(state: str) -> dict[str, Any]:
    """A state of the pool in llama-server's words."""
    value = {"value": VALUES.get(state, "unloaded")}
    return {**value, "failed": True, "exit_code": 1} if state == "failed" else value


async def stream(ledger: LedgerClient, is_shown: Callable[[str], bool]) -> AsyncGenerator[bytes, None]:
    """The events of the models that a caller may see. Endless; a comment where nothing happens."""
    has_begun = False
    async with contextlib.aclosing(follow(ledger)) as steps:
        async for found in steps:
            told: list[dict[str, Any]] = []
            if found is not None and found.snapshot is not None:
                # Of another life of the ledger, or after too long a pause: what the client knows is old.
                told = [{"model": "*", "event": "models_reload"}] if has_begun else []
                has_begun = True
            elif found is not None:
                told = [each for change in found.changes if (each := event(change)) is not None]
            shown = [each for each in told if each["model"] == "*" or is_shown(each["model"])]
            yield b"".join(b"data: " + json.dumps(each).encode() + b"\n\n" for each in shown) or comment("waiting")


def event(change: Change) -> dict[str, Any] | None:
    """A change of the pool as an event, where it is one of a model."""
    if change.kind == "config":
        return {"model": "*", "event": "models_reload"}
    if change.kind == "model" and change.data["removed"]:
        return {"model": change.model, "event": "model_remove"}
    if change.kind == "model":
        said = status(change.data["state"])
        return {"model": change.model, "event": "model_status", "data": {"status": said.pop("value"), **said}}
    if change.kind == "load":
        progress = {"stages": ["text_model"], "current": "text_model", "value": change.data["progress"]}
        return {
            "model": change.model,
            "event": "model_status",
            "data": {"status": "loading", "progress": progress},
        }
    return None
