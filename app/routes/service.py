"""The service family: is it alive, can it serve, and what is it doing."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from cluster import errors
from deployments.gateway import Gateway

router = APIRouter(tags=["service"])


@router.get("/health")
async def health(request: Request) -> dict[str, str]:
    """Whether this process lives; says nothing of models."""
    gateway: Gateway = request.app.state.gateway
    return {"status": "healthy", "execution_mode": gateway.config.mode, "version": request.app.version}


@router.get("/ready")
async def ready(request: Request) -> Response:
    """200 once the ledger answers and every model that is preloaded at start is loaded, 503 until then.

    503 as well while requests wait and nothing moves any more, with what is stuck (`cluster.watchdog`).
    """
    gateway: Gateway = request.app.state.gateway
    try:
        ledger = await gateway.ledger.status()
    except errors.BackendUnavailable as error:
        return JSONResponse({"ready": False, "reason": error.message}, 503)
    if ledger["stalled"]:
        return JSONResponse({"ready": False, "reason": ledger["stalled"]}, 503)
    models = ledger["models"]
    awaited = [name for name, model in gateway.config.models.items() if model.enabled or model.min_replicas]
    missing = [name for name in awaited if _is_missed(models.get(name))]
    if missing:
        return JSONResponse({"ready": False, "reason": f"not loaded yet: {', '.join(missing)}"}, 503)
    return JSONResponse({"ready": True})


def _is_missed(row: dict[str, Any] | None) -> bool:
    """A model that once was loaded and made room for another is not missed: the pool serves it on demand."""
    if row is None or row["state"] == "failed":
        return True
    return row["state"] != "loaded" and row["load_s"] is None


@router.get("/v1/status")
async def status(request: Request) -> dict[str, Any]:
    """The pool's models as backends, and the ledger's life."""
    gateway: Gateway = request.app.state.gateway
    ledger = await gateway.ledger.status()
    models = ledger["models"]
    backends = {
        name: {
            "is_running": models[name]["ready"] > 0,
            "is_healthy": models[name]["state"] != "failed",
            "pid": None,
            "url": None,
            "uptime": None,
            "last_request_time": None,
            "error": models[name]["last_error"],
        }
        for name in gateway.config.models
        if name in models
    }
    for server in ledger["servers"]:
        backends[server["url"]] = {
            "is_running": server["is_up"],
            "is_healthy": server["is_up"],
            "pid": None,
            "url": server["url"],
            "uptime": None,
            "last_request_time": None,
            "error": server["last_refresh_error"],
        }
    return {"execution_mode": gateway.config.mode, "backends": backends, "ledger": ledger}
