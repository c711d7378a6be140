"""The operators' family: what every model is doing, what the GPUs hold, and load and unload by hand.

The same under `/v1/admin` and `/admin`; only the lists differ in shape, and `/admin/models/load|unload` take the
model's id from the body. With `admin_keys` configured, all of it needs one (`app.auth`). Errors carry `detail` beside
the canonical object (`app.answers`).
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from app.body import read_json
from app.routes.admin_rows import admin_row, gpu_row, is_resident, memory_row, short_row
from cluster import effects, errors
from cluster.config import CacheType, FlashAttention
from deployments.gateway import Gateway

logger = logging.getLogger("slotpool.admin")

Schema = TypeVar("Schema", bound=BaseModel)

#: Under both prefixes.
router = APIRouter(tags=["admin"])
#: Under `/v1/admin`.
list_router = APIRouter(tags=["admin"])
#: Under `/admin`.
short_router = APIRouter(tags=["admin"])

#: Loads that go on in the background; a task that nobody refers to may vanish.
_background: set[asyncio.Task[None]] = set()


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

    def overrides(self) -> list[str]:
        """The keys that would change the engine for this load; an explicit null is one, too."""
        return sorted(self.model_fields_set - {"replicas"})


class LoadById(BaseModel):
    """The body of `POST /admin/models/load`; `path` and `quant` say what to register, which is not done here."""

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

    Overrides of engine settings for a single load are checked, and then refused with 400 `invalid_load_request`: every
    replica of a model runs what is configured.
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
    gateway = _gateway(request)
    ledger = await gateway.ledger.status()
    return JSONResponse({"models": [admin_row(gateway.config, name, ledger) for name in gateway.config.models]})


@short_router.get("/models")
async def list_resident(request: Request) -> Response:
    """The models that are loaded, load or have failed to."""
    gateway = _gateway(request)
    ledger = await gateway.ledger.status()
    names = [name for name in gateway.config.models if is_resident(name, ledger)]
    return JSONResponse({"object": "list", "models": [short_row(gateway.config, name, ledger) for name in names]})


@short_router.post("/models/load")
async def load_in_background(request: Request) -> Response:
    """Begin to load a configured model; `GET /admin/models` tells how it goes."""
    gateway = _gateway(request)
    asked = await _body(request, LoadById)
    name = _known(gateway, asked.id)

    async def run() -> None:
        try:
            await gateway.ledger.load(name, max(1, gateway.config.models[name].min_replicas))
        except errors.PoolError as error:
            logger.warning("background load of %s: %s", name, error.message)

    task = asyncio.create_task(run())
    _background.add(task)
    task.add_done_callback(_background.discard)
    message = f"the model {name!r} is being loaded"
    answer = {"batch_id": uuid.uuid4().hex, "model_id": name, "status": "loading", "message": message}
    return JSONResponse(answer, 202)


@short_router.post("/models/unload")
async def unload_by_id(request: Request) -> Response:
    """Unload a model and wait for the end of it; 404 if it is not loaded."""
    gateway = _gateway(request)
    name = _known(gateway, (await _body(request, UnloadById)).id)
    row = (await gateway.ledger.status()).models.get(name)
    if row is None or row.state in ("unloaded", "failed"):
        raise errors.ModelNotFound(f"the model {name!r} is not loaded", code="model_not_loaded")
    await gateway.ledger.unload(name)
    return JSONResponse({"model_id": name, "status": "unloaded"})


async def _load(request: Request, model: str) -> tuple[str, int]:
    gateway = _gateway(request)
    name = _known(gateway, model)
    options = await _body(request, LoadOptions)
    overrides = options.overrides()
    if overrides:
        raise errors.InvalidRequest(
            f"{', '.join(overrides)}: settings of a single load are not supported; they are the configuration's",
            param=overrides[0],
            code="invalid_load_request",
        )
    replicas = options.replicas or max(1, gateway.config.models[name].min_replicas)
    return name, await gateway.ledger.load(name, replicas)


async def _unload(request: Request, model: str) -> str:
    gateway = _gateway(request)
    name = _known(gateway, model)
    await gateway.ledger.unload(name)
    return name


def _gateway(request: Request) -> Gateway:
    gateway: Gateway = request.app.state.gateway
    return gateway


def _known(gateway: Gateway, model: str) -> str:
    """The id for an id or alias. Raises `ModelNotFound`; also for a public name, which is no one model's."""
    name = gateway.config.resolve(model)
    if name is None or name not in gateway.config.models:
        raise errors.ModelNotFound(f"the model {model!r} does not exist", available_models=list(gateway.config.models))
    return name


async def _body(request: Request, schema: type[Schema]) -> Schema:
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
