"""Before a request is sent: how a model comes to this pool, and whether a request would be taken."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from app.asking import asked
from app.auth import caller_of
from app.body import read_json
from cluster import errors
from deployments.engines.registry import BACKENDS
from deployments.gateway import Gateway
from deployments.requests import model_of
from deployments.schemas import CHAT, COMPLETIONS, EMBEDDINGS

router = APIRouter(tags=["service"])

#: Which member of a body says what it is for.
KINDS = {"messages": CHAT, "prompt": COMPLETIONS, "input": EMBEDDINGS}

STEPS = (
    "Place the model's file on every machine that may load it; the pool downloads nothing by itself.",
    "Name it in the configuration under models: an id, a backend, and model_path (a path, package:NAME/FILE, or "
    "hf:OWNER/REPO/FILE, which is fetched once).",
    "Deploy, or POST /v1/admin/settings/reload; or register it at run time with POST /v1/admin/models.",
    "GET /v1/models lists it; the first request loads it.",
)


@router.get("/v1/models/install")
async def install() -> dict[str, Any]:
    """How to place a model on disk. Nothing is ever downloaded by asking."""
    return {
        "downloads": False,
        "steps": list(STEPS),
        "backends": [backend.names[0] for backend in BACKENDS],
        "example": {"id": "my-model", "backend": "llama_cpp", "model_path": "/models/my-model.gguf", "num_gpus": 1},
    }


@router.post("/v1/models/validate")
async def validate(request: Request) -> Response:
    """Check the body of a chat, a completion or an embedding against its model, without running it.

    A model that does not exist, or is not the caller's, is refused as the request itself would be; whatever else is
    wrong is the `error` of an answer.
    """
    gateway: Gateway = request.app.state.gateway
    body = await read_json(request, gateway.config.max_body_mb)
    model = model_of(gateway.config, body, caller_of(request))
    path = next((path for member, path in KINDS.items() if member in body), CHAT)
    answer: dict[str, Any] = {"valid": True, "model": model, "path": path}
    try:
        asked(request, path, body)
    except errors.InvalidRequest as error:
        answer |= {"valid": False, **error.body()}
    return JSONResponse(answer)
