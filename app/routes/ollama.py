"""Ollama's family: chat, generate, embed, and what models there are. These are configured, so nothing is pulled.

Its requests wait as long as their client does (`deployments.requests.patient`).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping
from importlib.metadata import version as version_of
from typing import Any, NamedTuple

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from app.asking import asked
from app.auth import caller_of
from app.body import read_json
from app.model_files import UNKNOWN, ModelFile, model_file
from app.openapi import Operation
from app.routes import ollama_rows as rows
from app.routes.adapted import answer, parsed
from app.routes.openai import remote_models, visible_models
from app.wire.adapter import NDJSON
from app.wire.ollama.adapter import OllamaAdapter
from app.wire.ollama.chat import checked, embeddings_of
from app.wire.ollama.schema import ChatRequest, EmbedRequest, GenerateRequest
from cluster import errors
from cluster.config import PoolConfig
from deployments.gateway import Gateway
from deployments.requests import is_allowed, model_of, patient, unknown_model
from deployments.run_info import RunInfo
from deployments.schemas import CHAT, EMBEDDINGS

router = APIRouter(tags=["ollama"])
operations = (
    Operation("/api/chat", "ollama", "Answer a conversation", ChatRequest, NDJSON),
    Operation("/api/generate", "ollama", "Answer a prompt", GenerateRequest, NDJSON),
    Operation("/api/embed", "ollama", "Embeddings of texts", EmbedRequest),
    Operation("/api/embeddings", "ollama", "Embedding of a text", EmbedRequest),
)

#: The version of Ollama whose API this is. Clients look at it before they use thinking, tools or Messages.
API_VERSION = "0.14.0"
#: What only makes sense where a server keeps models of its own.
MANAGING = (
    ("POST", "/api/pull"),
    ("POST", "/api/push"),
    ("POST", "/api/create"),
    ("POST", "/api/copy"),
    ("DELETE", "/api/delete"),
    ("POST", "/api/blobs/{digest}"),
    ("HEAD", "/api/blobs/{digest}"),
)


@router.post("/api/chat")
async def chat(request: Request) -> Response:
    """Answer a conversation. One without messages loads its model, or with `keep_alive: 0` unloads it."""
    return await _run(request, OllamaAdapter(await _body(request)))


@router.post("/api/generate")
async def generate(request: Request) -> Response:
    """Answer a prompt. Without one, as `chat` without messages."""
    body = await _body(request)
    gateway: Gateway = request.app.state.gateway
    if await asyncio.to_thread(_only_continues, gateway.config, body["model"]):
        body = {**body, "raw": True}
    return await _run(request, OllamaAdapter(body, generates=True))


@router.post("/api/embed")
async def embed(request: Request) -> Response:
    """The embeddings of one or several texts."""
    body = await _body(request)
    started = time.monotonic()
    found = await _embed(request, body)
    answered = {
        "model": body.get("model"),
        "embeddings": found.vectors,
        "total_duration": int((time.monotonic() - started) * 1e9),
        "load_duration": found.load_ns,
        "prompt_eval_count": found.tokens,
    }
    return JSONResponse(answered)


@router.post("/api/embeddings")
async def embeddings(request: Request) -> Response:
    """The older form of `embed`, for one text."""
    return JSONResponse({"embedding": (await _embed(request, await _body(request))).vectors[0]})


@router.get("/api/tags")
async def tags(request: Request) -> Response:
    """Every model."""
    gateway: Gateway = request.app.state.gateway
    config, ledger = gateway.config, await gateway.ledger.status()
    listed = visible_models(config, ledger, caller_of(request))
    files = await asyncio.to_thread(_files, config, listed)
    return JSONResponse({"models": [rows.tag(name, config.models.get(name), files[name]) for name in listed]})


@router.get("/api/ps")
async def ps(request: Request) -> Response:
    """The models that are loaded."""
    gateway: Gateway = request.app.state.gateway
    config, ledger = gateway.config, await gateway.ledger.status()
    loaded = [name for name, row in ledger.models.items() if row.state == "loaded"]
    listed = [name for name in loaded if is_allowed(config, caller_of(request), name)]
    files = await asyncio.to_thread(_files, config, listed)
    return JSONResponse({"models": [rows.running(name, config, ledger, files[name]) for name in listed]})


@router.post("/api/show")
async def show(request: Request) -> Response:
    """One model, from the configuration and its file."""
    gateway: Gateway = request.app.state.gateway
    config = gateway.config
    name = model_of(config, await _body(request), caller_of(request))
    # Of a public name's variants the first speaks for all.
    name = config.names.variants[name][0][0] if name in config.names.variants else name
    if name not in config.models and name not in remote_models(config, await gateway.ledger.status()):
        raise unknown_model(name, list(config.models))
    files = await asyncio.to_thread(_files, config, [name])
    return JSONResponse(rows.shown(name, config.models.get(name), files[name]))


@router.get("/api/version")
async def version() -> dict[str, str]:
    """The version of Ollama's API that is spoken here, and the pool's own."""
    return {"version": API_VERSION, "slotpool": version_of("slotpool")}


async def managing(request: Request) -> Response:
    """Models are the configuration's: they are neither fetched, made nor deleted here."""
    raise errors.InvalidRequest(
        "this pool's models are configured: put the file on the machine (GET /v1/models/install says how), "
        "and add it to the configuration or with POST /v1/admin/models",
        status=501,
        code="NOT_IMPLEMENTED",
    )


for method, path in MANAGING:
    router.add_api_route(path, managing, methods=[method])


async def _run(request: Request, adapter: OllamaAdapter) -> Response:
    if not adapter.is_empty:
        return await answer(request, adapter, is_patient=True)
    gateway: Gateway = request.app.state.gateway
    question = {**adapter.chat, "messages": [{"role": "user", "content": ""}]}
    wanted, _ = asked(request, CHAT, question)
    unloads = adapter.chat.get("keep_alive") == 0
    if not unloads or await _is_resident(gateway, wanted.model):
        await gateway.touch(patient(gateway.config, wanted))
    return JSONResponse(adapter.done("unload" if unloads else "load"))


async def _is_resident(gateway: Gateway, model: str) -> bool:
    row = (await gateway.ledger.status()).models.get(model)
    return row is not None and row.state in ("loaded", "loading")


class Embedded(NamedTuple):
    vectors: list[Any]
    tokens: int
    load_ns: int


async def _embed(request: Request, body: Mapping[str, Any]) -> Embedded:
    gateway: Gateway = request.app.state.gateway
    given = checked(EmbedRequest, body)
    if given.input is None and given.prompt is None:
        raise errors.InvalidRequest("input: the text to embed is missing", param="input")
    wanted, embedding = asked(request, EMBEDDINGS, embeddings_of(given, body))
    info = RunInfo()
    async with contextlib.aclosing(gateway.stream(patient(gateway.config, wanted), embedding, info)) as chunks:
        found = parsed(b"".join([chunk async for chunk in chunks]))
    try:
        vectors = [each["embedding"] for each in found["data"]]
        tokens = found.get("usage", {}).get("prompt_tokens", 0)
    except (KeyError, TypeError, AttributeError):
        vectors = []
    if not vectors:
        raise errors.BackendUnavailable(
            "the engine's embeddings cannot be understood", status=502, code="upstream_response_parse_failure"
        )
    return Embedded(vectors, tokens, int(info.metrics()["engine_load_wait_ms"] * 1e6))


async def _body(request: Request) -> dict[str, Any]:
    """The request's object, with its model by the name that the pool has for it. The model is looked at first."""
    gateway: Gateway = request.app.state.gateway
    body: Any = await read_json(request, gateway.config.max_body_mb)
    if isinstance(body, dict):
        # `name` is what older clients of `/api/show` say.
        body = {**body, "model": known_name(gateway.config, body.get("model", body.get("name")))}
    model_of(gateway.config, body, caller_of(request))
    checked_body: dict[str, Any] = body
    return checked_body


def known_name(config: PoolConfig, name: Any) -> Any:
    """The name as the pool knows it: Ollama's clients put `:latest` behind one without a tag, or leave it out."""
    if not isinstance(name, str) or name in config.names.targets:
        return name or config.default_model
    plain = name.removesuffix(":latest")
    return next((each for each in (plain, f"{plain}:latest") if each in config.names.targets), name)


def _only_continues(config: PoolConfig, name: str) -> bool:
    """Whether a model has no chat template: its prompts are then the text itself, as Ollama has it. Blocks."""
    model = config.models.get(config.resolve(name) or name)
    return model is not None and model.prompt_format is None and model_file(model.model_path).is_base


def _files(config: PoolConfig, names: list[str]) -> dict[str, ModelFile]:
    """What is known of the files of models. Blocks."""
    return {name: model_file(config.models[name].model_path) if name in config.models else UNKNOWN for name in names}
