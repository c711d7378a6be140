"""The service family: is it alive, can it serve, and what is it doing."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse

from cluster import errors
from cluster.ledger.snapshot import ModelRow, ServerRow, Snapshot, as_dict
from deployments.gateway import Gateway

router = APIRouter(tags=["service"])

#: What Prometheus calls its text format.
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


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
    if ledger.stalled:
        return JSONResponse({"ready": False, "reason": ledger.stalled}, 503)
    models = ledger.models
    awaited = [name for name, model in gateway.config.models.items() if model.enabled or model.min_replicas]
    missing = [name for name in awaited if _is_missed(models.get(name))]
    if missing:
        return JSONResponse({"ready": False, "reason": f"not loaded yet: {', '.join(missing)}"}, 503)
    return JSONResponse({"ready": True})


def _is_missed(row: ModelRow | None) -> bool:
    """A model that once was loaded and made room for another is not missed: the pool serves it on demand."""
    if row is None or row.state == "failed":
        return True
    return row.state != "loaded" and row.load_s is None


@router.get("/v1/status")
async def status(request: Request) -> dict[str, Any]:
    """The pool's models as backends, and the ledger's life."""
    gateway: Gateway = request.app.state.gateway
    ledger = await gateway.ledger.status()
    backends = {name: _model(name, ledger) for name in gateway.config.models if name in ledger.models}
    backends |= {server.url: _server(server) for server in ledger.servers}
    return {"execution_mode": gateway.config.mode, "backends": backends, "ledger": as_dict(ledger)}


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """The pool's figures as Prometheus text (`docs/metrics.md`)."""
    gateway: Gateway = request.app.state.gateway
    return Response(await gateway.ledger.metrics(), media_type=CONTENT_TYPE)


def _model(name: str, ledger: Snapshot) -> dict[str, Any]:
    """A model as a backend: `pid`, `url` and `uptime` are those of its oldest replica that serves."""
    row = ledger.models[name]
    ready = [each for each in ledger.replicas if each.model == name and each.state == "READY"]
    oldest = min(ready, key=lambda each: each.started_at or ledger.time, default=None)
    started_at = oldest.started_at if oldest is not None else None
    return {
        "is_running": row.ready > 0,
        "is_healthy": row.state != "failed",
        "pid": None if oldest is None else oldest.pid,
        "url": None if oldest is None else oldest.url,
        "uptime": None if started_at is None else round(max(0.0, ledger.time - started_at), 3),
        "last_request_time": None if row.last_arrival is None else ledger.time - (ledger.now - row.last_arrival),
        "error": row.last_error,
    }


def _server(server: ServerRow) -> dict[str, Any]:
    return {
        "is_running": server.is_up,
        "is_healthy": server.is_up,
        "pid": None,
        "url": server.url,
        "uptime": None,
        "last_request_time": None,
        "error": server.last_refresh_error,
    }
