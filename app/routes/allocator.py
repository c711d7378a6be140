"""The allocator's family: one prompt, one answer, and the device that it ran on."""

from __future__ import annotations

import contextlib
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from app.asking import asked
from app.body import read_json
from app.routes.adapted import parsed
from app.streams import request_id_of
from cluster.config import PoolConfig
from cluster.ledger.snapshot import Snapshot
from deployments.gateway import Gateway
from deployments.requests import invalid
from deployments.run_info import RunInfo
from deployments.schemas import COMPLETIONS, parse_priority

router = APIRouter(tags=["allocator"])

#: The longest id of a request, in characters; it is kept and logged.
MAX_ID = 200


class Inference(BaseModel):
    """The body of a request. What is not known here is refused with 422."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    model_id: str
    prompt: str
    priority: int | None = None
    request_id: Annotated[str, Field(min_length=1, max_length=MAX_ID)] | None = None

    @field_validator("request_id")
    @classmethod
    def _printable(cls, value: str | None) -> str | None:
        if value is not None and not value.isprintable():
            raise ValueError("must be printable")
        return value

    @field_validator("priority", mode="before")
    @classmethod
    def _class_of(cls, value: Any) -> int | None:
        return None if value is None else parse_priority(value)


@router.post("/inference")
async def infer(request: Request) -> Response:
    """Complete a prompt. Waiting and running together take `request_timeout_seconds` at most, by default 30."""
    gateway: Gateway = request.app.state.gateway
    config = gateway.config
    try:
        given = Inference.model_validate(await read_json(request, config.max_body_mb))
    except ValidationError as error:
        raise invalid(error, 422) from None
    request_id = given.request_id or request_id_of(request)
    body = {"model": _known(config, given.model_id), "prompt": given.prompt, "priority": given.priority}
    wanted, checked = asked(request, COMPLETIONS, body, request_id)
    info = RunInfo()
    wanted = wanted._replace(timeout_s=min(wanted.timeout_s, config.allocator_timeout_s))
    async with contextlib.aclosing(gateway.stream(wanted, checked, info)) as chunks:
        completion = parsed(b"".join([chunk async for chunk in chunks]))
    answer = {
        "request_id": request_id,
        "model_id": info.model,
        "output": completion["choices"][0]["text"],
        "gpu_id": info.devices[0] if info.devices else None,
        "inference_time_ms": info.report.total_ms,
    }
    return JSONResponse(answer)


@router.get("/status")
async def status(request: Request) -> dict[str, int]:
    """How many wait, and how many devices run something."""
    gateway: Gateway = request.app.state.gateway
    ledger = await gateway.ledger.status()
    busy = _busy_gpus(ledger)
    return {"queue_size": ledger.queued, "gpus_available": max(0, ledger.gpus - busy), "gpus_busy": busy}


def _known(config: PoolConfig, model: str) -> str:
    """The default model stands in for one that nobody knows."""
    return model if config.default_model is None or config.resolve(model) is not None else config.default_model


def _busy_gpus(ledger: Snapshot) -> int:
    return len({(each.node, device) for each in ledger.replicas if each.leases for device in each.devices})
