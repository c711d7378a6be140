"""Anthropic's family: Messages, and the tokens of a prompt.

`anthropic-*` headers and `?beta=true` change nothing here.
"""

from __future__ import annotations

import contextlib
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from app.asking import asked
from app.openapi import Operation
from app.routes.adapted import answer, parsed, read_body
from app.streams import request_id_of
from app.wire.adapter import EVENT_STREAM
from app.wire.messages.adapter import MessagesAdapter
from app.wire.messages.chat import checked, prompt_of
from app.wire.messages.schema import MessagesRequest, Prompt
from cluster import errors
from deployments.gateway import Gateway
from deployments.schemas import TOKENIZE

router = APIRouter(tags=["messages"])
operations = (
    Operation("/v1/messages", "messages", "Answer a conversation", MessagesRequest, EVENT_STREAM),
    Operation("/v1/messages/count_tokens", "messages", "How many tokens a prompt has", Prompt),
)


@router.post("/v1/messages")
async def create(request: Request) -> Response:
    """Answer a conversation, streamed or not."""
    response = await answer(request, MessagesAdapter(await _body(request), request_id_of(request)))
    response.headers["request-id"] = request_id_of(request)
    return response


@router.post("/v1/messages/count_tokens")
async def count_tokens(request: Request) -> Response:
    """How many tokens the prompt of a conversation has, by the model's own template and vocabulary."""
    gateway: Gateway = request.app.state.gateway
    body = await _body(request)
    chat, _ = prompt_of(checked(Prompt, body), body)
    wanted, prompt = asked(request, TOKENIZE, chat)
    async with contextlib.aclosing(gateway.stream(wanted, prompt)) as chunks:
        counted = parsed(b"".join([chunk async for chunk in chunks]))
    if not isinstance(counted.get("count"), int):
        message = f"the server of {wanted.model!r} does not count the tokens of a conversation"
        raise errors.BackendUnavailable(message, status=501, code="NOT_IMPLEMENTED")
    return JSONResponse({"input_tokens": counted["count"]}, headers={"request-id": wanted.trace})


@router.head("/", response_class=Response)
async def root() -> Response:
    """Whether there is a server, as Claude Code and Ollama's clients ask."""
    return Response()


async def _body(request: Request) -> dict[str, Any]:
    """The body, with the model's name in it also where the pool's default is meant."""
    gateway: Gateway = request.app.state.gateway
    body = await read_body(request)
    return {**body, "model": body.get("model") or gateway.config.default_model}
