"""Models that come, change and go while the pool runs: register, patch, remove, and read the file again.

Under `/v1/admin`, beside `app.routes.admin`. Nothing of it is ever written to a file.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from app.body import read_json
from app.routes.admin_rows import admin_row
from cluster import errors
from cluster.config import Configuration
from cluster.ledger.snapshot import Snapshot
from deployments.gateway import Gateway
from deployments.runtime_models import RuntimeModels

router = APIRouter(tags=["admin"])

#: The largest body of a change, in MiB.
MAX_BODY_MB = 1.0


@router.post("/models")
async def register(request: Request) -> Response:
    """Register a model: `id` and the keys of a model in the configuration. 201 with its row."""
    keys = await read_object(request)
    model = keys.pop("id", None)
    if not isinstance(model, str):
        raise errors.InvalidRequest("id: a string is needed", param="id", status=422)
    request.state.model = model
    configuration = await runtime_of(request).register(model, keys)
    return JSONResponse(await row(request, configuration, model), 201)


@router.patch("/models/{model:path}")
async def patch(request: Request, model: str) -> Response:
    """Change keys of a model; null sets one back to its default. 200 with its row."""
    keys = await read_object(request)
    name = model_id(request, model)
    configuration = await runtime_of(request).patch(name, keys)
    return JSONResponse(await row(request, configuration, name))


@router.delete("/models/{model:path}")
async def remove(request: Request, model: str) -> Response:
    """Remove a model: its queue is refused, its streams finish, and then it is gone."""
    name = model_id(request, model)
    await runtime_of(request).remove(name)
    return JSONResponse({"status": "removed", "model": name})


@router.post("/settings/reload")
async def reload(request: Request) -> Response:
    """Read the configuration file again; only models that it changes drain."""
    configuration = await runtime_of(request).reload()
    return JSONResponse({"status": "reloaded", "models": list(configuration.pool.models)})


def runtime_of(request: Request) -> RuntimeModels:
    """The part of this ingress that changes the configuration."""
    runtime: RuntimeModels = request.app.state.runtime
    return runtime


def model_id(request: Request, model: str) -> str:
    """The id for an id or alias in the newest configuration; what is neither is left to be refused by its name."""
    return runtime_of(request).configuration.pool.names.targets.get(model, model)


async def row(request: Request, configuration: Configuration, model: str) -> dict[str, Any]:
    """The admin row of a model as it is now."""
    gateway: Gateway = request.app.state.gateway
    return row_of(configuration, model, await gateway.ledger.status())


def row_of(configuration: Configuration, model: str, ledger: Snapshot) -> dict[str, Any]:
    """The admin row of a model, with what is laid over it for its present load."""
    row = admin_row(configuration.pool, model, ledger)
    return {**row, "load_override": dict(configuration.overrides.get(model, {}))}


async def read_object(request: Request) -> dict[str, Any]:
    """The body, which must be a JSON object. Raises `InvalidRequest` with status 422 when it is another thing."""
    body = await read_json(request, MAX_BODY_MB)
    if not isinstance(body, dict):
        raise errors.InvalidRequest("the body must be a JSON object", status=422)
    return body
