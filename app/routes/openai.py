"""The OpenAI family: chat completions, completions, embeddings, tokens, and the list of models."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from app.asking import asked
from app.auth import caller_of
from app.body import read_json
from app.openapi import Operation
from app.routes.adapted import ignored_header
from app.routes.admin_rows import NOTHING
from app.streams import Rhythm, Stream
from app.wire.hosted import without_hosted_tools
from cluster.config import Caller, ModelConfig, PoolConfig
from cluster.ledger.snapshot import ModelRow, Snapshot
from deployments.engines.registry import capabilities
from deployments.gateway import Gateway
from deployments.requests import is_allowed, model_of, unknown_model
from deployments.schemas import (
    CHAT,
    COMPLETIONS,
    DETOKENIZE,
    EMBEDDINGS,
    TOKENIZE,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)
from deployments.sse import is_comment

router = APIRouter(tags=["openai"])


class Inference:
    """The ASGI endpoint of a route that asks a model. Plain, since what a framework does for each request costs more
    than all of the pool's own work on it in this process.
    """

    def __init__(self, path: str) -> None:
        self._path = path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = await infer(Request(scope, receive), self._path)
        await response(scope, receive, send)


EVENTS = "text/event-stream"
operations = (
    Operation(CHAT, "openai", "Chat completion", ChatRequest, EVENTS),
    Operation(COMPLETIONS, "openai", "Completion", CompletionRequest, EVENTS),
    Operation(EMBEDDINGS, "openai", "Embeddings", EmbeddingRequest),
    Operation(TOKENIZE, "openai", "A text, or a chat, as tokens", TokenizeRequest),
    Operation(DETOKENIZE, "openai", "Tokens as text", DetokenizeRequest),
)
inference_routes = [Route(each.path, Inference(each.path), methods=["POST"]) for each in operations]


async def infer(request: Request, path: str) -> Response:
    """Run the request's body through the pool. The status is sent only once there is something to say."""
    gateway: Gateway = request.app.state.gateway
    body = await read_json(request, gateway.config.max_body_mb)
    body, ignored = without_hosted_tools(body) if path == CHAT else (body, [])
    wanted, checked = asked(request, path, body)
    headers = ignored_header(ignored, wanted)
    chunks = gateway.stream(wanted, checked)
    if not checked.get("stream"):
        async with contextlib.aclosing(chunks):
            whole = b"".join([chunk async for chunk in chunks])
        return Response(whole, headers=headers, media_type="application/json")
    try:
        first = await anext(chunks)
    except BaseException:
        await chunks.aclose()
        raise
    if is_comment(first):
        # It waits: from here on a generator looks at every chunk, which a stream that begins at once need not pay for.
        event = empty_event(path, wanted.trace, wanted.model)
        return Stream(first + event, chunks, rest=with_events(chunks, event), headers=headers)
    return Stream(first, chunks, headers=headers)


async def with_events(chunks: AsyncGenerator[bytes, None], event: bytes) -> AsyncGenerator[bytes, None]:
    """The rest of a stream that has begun with a sign of life and an empty event: from time to time another."""
    rhythm = Rhythm()
    async for chunk in chunks:
        yield chunk + event if is_comment(chunk) and rhythm.is_due() else chunk


def empty_event(path: str, request_id: str, model: str) -> bytes:
    """A chunk that says nothing. Agents count parsed events and not comments, and give up where none comes."""
    is_chat = path == CHAT
    said: dict[str, Any] = {"delta": {}} if is_chat else {"text": ""}
    event = {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{request_id}",
        "object": "chat.completion.chunk" if is_chat else "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": [{"index": 0, **said, "logprobs": None, "finish_reason": None}],
    }
    return b"data: " + json.dumps(event).encode() + b"\n\n"


@router.get("/v1/models")
async def list_models(request: Request, model: str | None = None) -> Response:
    """Every configured model with its status; `?model=ID` answers for one."""
    if model is not None:
        return await show_model(request, model)
    rows = await model_rows(request)
    return JSONResponse({"object": "list", "data": rows, "models": [row["id"] for row in rows if is_loaded(row)]})


async def model_rows(request: Request) -> list[dict[str, Any]]:
    """A row for each model that the caller may use."""
    gateway: Gateway = request.app.state.gateway
    ledger = await gateway.ledger.status()
    config = gateway.config
    return [
        _row(config, name, ledger.models) if name in config.models else remote_row(name, ledger)
        for name in visible_models(config, ledger, caller_of(request))
    ]


def is_loaded(row: dict[str, Any]) -> bool:
    """Whether the model of a row answers without a load."""
    return bool(row["status"] == "loaded")


@router.get("/v1/models/{model:path}")
async def show_model(request: Request, model: str) -> Response:
    """One model, by its id or an alias, or the public name of several variants."""
    gateway: Gateway = request.app.state.gateway
    name = model_of(gateway.config, {"model": model}, caller_of(request))
    ledger = await gateway.ledger.status()
    if name in gateway.config.names.targets:
        return JSONResponse(_row(gateway.config, name, ledger.models))
    if name not in remote_models(gateway.config, ledger):
        raise unknown_model(name, visible_models(gateway.config, ledger, caller_of(request)))
    return JSONResponse(remote_row(name, ledger))


def visible_models(config: PoolConfig, ledger: Snapshot, caller: Caller) -> list[str]:
    """The ids of all models that a caller may use: the configured ones, and those that only servers offer."""
    names = [*config.models, *remote_models(config, ledger)]
    return [name for name in names if is_allowed(config, caller, name)]


def remote_models(config: PoolConfig, ledger: Snapshot) -> list[str]:
    """The models that only external servers offer, by the ledger's snapshot."""
    offered = dict.fromkeys(name for server in ledger.servers for name in server.available_models)
    kept = [name for name, model in ledger.models.items() if model.remote and name not in offered]
    # One whose server is away is still listed, as failed, until a server says that it is gone.
    return [name for name in [*offered, *kept] if name not in config.models]


def remote_row(name: str, ledger: Snapshot) -> dict[str, Any]:
    """A model of external servers, in the words of a configured one."""
    servers = [server for server in ledger.servers if name in server.available_models]
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": "server",
        "type": "llm",
        "execution_mode": "remote",
        "backend": "server",
        "format": None,
        "status": ledger.models.get(name, NOTHING).state,
        "aliases": [],
        "capabilities": ["chat"],
        "context_length": None,
        "max_model_len": None,
        "slots": sum(server.max_concurrent for server in servers),
        "min_replicas": 0,
        "max_replicas": 0,
        "servers": [server.url for server in servers],
    }


def _row(config: PoolConfig, name: str, states: dict[str, ModelRow]) -> dict[str, Any]:
    variants = config.names.variants.get(name)
    if variants is not None:
        rows = [_row(config, variant, states) for variant, _ in variants]
        shown = next((row for row in rows if row["status"] == "loaded"), rows[0])
        weights = [{"model": variant, "weight": weight} for variant, weight in variants]
        return {**shown, "id": name, "aliases": [], "variants": weights}
    model: ModelConfig = config.models[name]
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": "slotpool",
        "type": model.type,
        "execution_mode": "remote" if model.is_remote else "gpu" if model.num_gpus else "cpu",
        "backend": model.backend,
        "format": model.format,
        "status": states.get(name, NOTHING).status,
        "aliases": list(model.aliases),
        "capabilities": capabilities(model),
        # The same under the name by which clients of vLLM look for it.
        "context_length": model.context_length,
        "max_model_len": model.context_length,
        "slots": config.model_in_pool(model).slots,
        "min_replicas": model.min_replicas,
        "max_replicas": model.max_replicas,
    }
