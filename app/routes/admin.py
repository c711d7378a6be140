"""The operators' family: what every model is doing, what the GPUs hold, and load and unload by hand.

The same under `/v1/admin` and `/admin`; only the lists differ in shape, and `/admin/models/load|unload` take the
model's id from the body. With `admin_keys` configured, all of it needs one (`app.auth`). Errors carry `detail` beside
the canonical object (`app.answers`).
"""

from __future__ import annotations

import asyncio
import uuid
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from app.body import read_json
from app.routes.admin_models import row_of, runtime_of
from app.routes.admin_rows import gpu_row, is_resident, memory_row, short_row
from cluster import effects, errors
from cluster.config import CacheType, FlashAttention
from deployments.gateway import Gateway
from deployments.requests import unknown_model

Schema = TypeVar("Schema", bound=BaseModel)

#: Under both prefixes.
router = APIRouter(tags=["admin"])
#: Under `/v1/admin`.
list_router = APIRouter(tags=["admin"])
#: Under `/admin`.
short_router = APIRouter(tags=["admin"])


class LoadOptions(BaseModel):
    """The body of a load, all of it optional. What is not known here is refused with 422."""

    model_config = ConfigDict(extra="forbid", strict=True)

    replicas: Annotated[int, Field(ge=1)] | None = None
    gguf_n_ctx: Annotated[int, Field(ge=1)] | None = None
    gguf_flash_attn: FlashAttention | None = None
    gguf_type_k: CacheType | None = None
    gguf_type_v: CacheType | None = None
    gguf_n_gpu_layers: int | None = None
    exllama_cache_size: Annotated[int, Field(ge=256, multiple_of=256)] | None = None
    exllama_cache_quant: Literal["8", "8,4"] | None = None
    exllama_cache_k_bits: Annotated[int, Field(ge=2, le=8)] | None = None
    exllama_cache_v_bits: Annotated[int, Field(ge=2, le=8)] | None = None
    exllama_max_rq_tokens: Annotated[int, Field(ge=1)] | None = None

    def overrides(self) -> dict[str, Any]:
        """The keys that are laid over the engine's own for this load; an explicit null is one, too."""
        return {key: getattr(self, key) for key in sorted(self.model_fields_set - {"replicas"})}


class LoadById(BaseModel):
    """The body of `POST /admin/models/load`; `path` and `quant` say what to register where the id is new."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    id: str
    path: str | None = None
    quant: str | None = None


class UnloadById(BaseModel):
    """The body of `POST /admin/models/unload`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    id: str


@router.post("/models/{model:path}/load")
async def load(request: Request, model: str) -> Response:
    """Load a model and wait until it serves. All of the replicas or none.

    Engine keys in the body hold for this load only, and are never written to a file. The pool refuses them with 400
    `invalid_load_request`, and the model stays as it was, where it is loaded or loads, where its backend does not know
    them, or where they do not go together.
    """
    name, replicas = await _load(request, model)
    return JSONResponse({"status": "loaded", "model": name, "loaded_replicas": replicas})


@router.post("/models/{model:path}/start")
async def start(request: Request, model: str) -> Response:
    """As `load`."""
    name, _ = await _load(request, model)
    return JSONResponse({"status": "started", "model": name})


@router.post("/models/{model:path}/unload")
async def unload(request: Request, model: str) -> Response:
    """Refuse the queued, let the running finish, unload, and wait for the end of it."""
    return JSONResponse({"status": "unloaded", "model": await _unload(request, model)})


@router.post("/models/{model:path}/stop")
async def stop(request: Request, model: str) -> Response:
    """As `unload`."""
    return JSONResponse({"status": "stopped", "model": await _unload(request, model)})


@router.get("/gpu-memory")
async def gpu_memory(request: Request) -> Response:
    """What the driver says of every GPU of the cluster, and what each model takes."""
    gateway = _gateway(request)
    (gpus, error), ledger = await asyncio.gather(effects.gpus_of_all_nodes(), gateway.ledger.status())
    models = [memory_row(gateway.config, name, ledger) for name in gateway.config.models]
    return JSONResponse({"gpus": [gpu_row(node, gpu) for node, gpu in gpus], "models": models, "error": error})


@list_router.get("/models")
async def list_models(request: Request) -> Response:
    """One row for each configured model."""
    ledger = await _gateway(request).ledger.status()
    configuration = runtime_of(request).configuration
    return JSONResponse({"models": [row_of(configuration, name, ledger) for name in configuration.pool.models]})


@short_router.get("/models")
async def list_resident(request: Request) -> Response:
    """The models that are loaded, load or have failed to."""
    gateway = _gateway(request)
    ledger = await gateway.ledger.status()
    names = [name for name in gateway.config.models if is_resident(name, ledger)]
    return JSONResponse({"object": "list", "models": [short_row(gateway.config, name, ledger) for name in names]})


@short_router.get("/stats")
async def stats(request: Request) -> Response:
    """What the pool has served in the ledger's present life, and what it does now."""
    ledger = await _gateway(request).ledger.status()
    return JSONResponse(
        {
            "requests_total": ledger.totals["requests"],
            "tokens_generated_total": ledger.totals["output_tokens"],
            "prompt_tokens_total": ledger.totals["prompt_tokens"],
            "active_requests": ledger.leases,
            "queue_depth": ledger.queued,
        }
    )


@short_router.post("/models/load")
async def load_in_background(request: Request) -> Response:
    """Begin to load a model, which is registered first if its id is new; `GET /admin/models` tells how it goes."""
    wanted = await body_of(request, LoadById)
    request.state.model = wanted.id
    runtime = runtime_of(request)
    if wanted.path is not None and wanted.id not in runtime.configuration.pool.names.targets:
        path = await asyncio.to_thread(path_of_quant, wanted.path, wanted.quant)
        await runtime.register(wanted.id, {"model_path": path})
    name = known_model(_gateway(request), wanted.id)
    runtime.load_in_background(name, max(1, runtime.configuration.pool.models[name].min_replicas))
    message = f"the model {name!r} is being loaded"
    answer = {"batch_id": uuid.uuid4().hex, "model_id": name, "status": "loading", "message": message}
    return JSONResponse(answer, 202)


@short_router.post("/models/unload")
async def unload_by_id(request: Request) -> Response:
    """Unload a model and wait for the end of it; 404 if it is not loaded."""
    gateway = _gateway(request)
    request.state.model = (await body_of(request, UnloadById)).id
    name = known_model(gateway, request.state.model)
    row = (await gateway.ledger.status()).models.get(name)
    if row is None or row.state in ("unloaded", "failed"):
        raise errors.ModelNotFound(f"the model {name!r} is not loaded", code="model_not_loaded")
    await gateway.ledger.unload(name)
    return JSONResponse({"model_id": name, "status": "unloaded"})


async def _load(request: Request, model: str) -> tuple[str, int]:
    gateway = _gateway(request)
    name = known_model(gateway, model)
    options = await body_of(request, LoadOptions)
    replicas = options.replicas or max(1, gateway.config.models[name].min_replicas)
    return name, await gateway.ledger.load(name, replicas, options.overrides() or None)


async def _unload(request: Request, model: str) -> str:
    gateway = _gateway(request)
    name = known_model(gateway, model)
    await gateway.ledger.unload(name)
    return name


def path_of_quant(path: str, quant: str | None) -> str:
    """The model file that a path and the name of a quantisation mean. Raises `InvalidRequest`; looks at the disk.

    A file is itself; of a folder it is the one GGUF file that has the quantisation in its name.
    """
    folder = Path(path)
    if quant is None or not folder.is_absolute() or not folder.is_dir():
        return path
    found = sorted(each for each in folder.glob("*.gguf") if quant.lower() in each.name.lower())
    if len(found) != 1:
        raise errors.InvalidRequest(f"quant: {len(found)} files of the folder have {quant!r} in their name", status=422)
    return str(found[0])


def _gateway(request: Request) -> Gateway:
    gateway: Gateway = request.app.state.gateway
    return gateway


def known_model(gateway: Gateway, model: str) -> str:
    """The id for an id or alias. Raises `ModelNotFound`; also for a public name, which is no one model's."""
    name = gateway.config.resolve(model)
    if name is None or name not in gateway.config.models:
        raise unknown_model(model, list(gateway.config.models))
    return name


async def body_of(request: Request, schema: type[Schema]) -> Schema:
    """The checked body; none at all counts as an empty object. Raises `InvalidRequest` with status 422."""
    length = request.headers.get("content-length", "0")
    chunked = "transfer-encoding" in request.headers
    body: Any = {} if length == "0" and not chunked else await read_json(request, 1.0)
    try:
        return schema.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        param = ".".join(map(str, first["loc"])) or None
        raise errors.InvalidRequest(f"{param or 'body'}: {first['msg']}", param=param, status=422) from None
