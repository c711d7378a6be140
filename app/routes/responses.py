"""The Responses API, and under `/llm-pool` the same in the pool dialect's flat rendering."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from app.auth import caller_of, route_path
from app.background import RUNNING, Background, as_it_stands
from app.openapi import Operation
from app.routes import adapted
from app.routes.openai import is_loaded, model_rows
from app.store import Store, Stored
from app.wire.adapter import EVENT_STREAM
from app.wire.responses.adapters import FlatResponses, Responses, flat
from app.wire.responses.chat import chat_body, decoded
from app.wire.responses.count import TokenCount
from app.wire.responses.items import new_id, references, whole_items
from app.wire.responses.schema import ResponsesRequest, check
from cluster import errors
from cluster.config import ModelConfig, PoolConfig
from deployments.engines.registry import counts_tokens, unused_decoding
from deployments.gateway import Gateway
from deployments.requests import resolve_model

PATH = "/v1/responses"
FLAT = "/llm-pool"

router = APIRouter(tags=["responses"])
flat_router = APIRouter(tags=["responses"])

operations = (
    *(Operation(path + PATH, "responses", "Ask a model", ResponsesRequest, EVENT_STREAM) for path in ("", FLAT)),
    *(
        Operation(f"{path}{PATH}/input_tokens", "responses", "How many tokens a model would read", ResponsesRequest)
        for path in ("", FLAT)
    ),
)

#: A header of OpenAI's client for Node, by which its `responses.stream()` names itself. That ends with an error at an
#: event that it does not know, so it gets the official ones only.
STRICT_READER = "x-stainless-helper-method"
#: What a field of the chat body is called here.
PARAMS = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}


class Create:
    """The ASGI endpoint that asks a model."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = await create(Request(scope, receive))
        await response(scope, receive, send)


create_routes = [Route(prefix + PATH, Create(), methods=["POST"]) for prefix in ("", FLAT)]


async def create(request: Request) -> Response:
    """Ask a model, streamed or not; with `background` only say that it will be asked."""
    body = await adapted.read_body(request)
    try:
        return await _create(request, body)
    except errors.PoolError as error:
        error.param = PARAMS.get(error.param or "", error.param)
        raise


async def _create(request: Request, body: dict[str, Any]) -> Response:
    is_flat = _is_flat(request)
    wanted = check(body, is_flat=is_flat)
    items, chat, ignored = await _prepared(request, wanted, is_flat=is_flat)
    config: PoolConfig = request.app.state.gateway.config
    kind = FlatResponses if is_flat else Responses
    adapter = kind(wanted, new_id("response"), wanted.model or str(config.default_model), chat, ignored)
    adapter.tells_metrics = STRICT_READER not in request.headers
    if wanted.store is False:
        if wanted.background:
            raise errors.InvalidRequest("background: needs store, or nobody could read the answer", param="background")
        return await adapted.answer(request, adapter)
    store: Store = request.app.state.store
    stored = Stored(caller_of(request).principal, adapter.response, items)
    if wanted.background and not wanted.stream:
        background: Background = request.app.state.background
        await background.start(adapter, stored, *adapted.admitted(request, adapter))
        return _rendered(request, adapter.response)

    async def keep() -> None:
        await store.save(stored)

    return await adapted.answer(request, adapter, keep)


async def _prepared(
    request: Request, wanted: ResponsesRequest, *, is_flat: bool
) -> tuple[list[dict[str, Any]], dict[str, Any], list[str]]:
    """The items of a request, the chat body that they and what went before come to, and what was left out."""
    config: PoolConfig = request.app.state.gateway.config
    store: Store = request.app.state.store
    principal = caller_of(request).principal
    ignored: list[str] = []
    history: list[dict[str, Any]] = []
    if wanted.previous_response_id is not None:
        found = await store.conversation(wanted.previous_response_id, principal)
        if found is None:
            raise errors.InvalidRequest(
                f"the response {wanted.previous_response_id!r} does not exist",
                param="previous_response_id",
                code="previous_response_not_found",
            )
        history = found
    named = references(wanted.items)
    items = whole_items(wanted.items, await store.items(named, principal) if named else {}, ignored)
    model = _configured(config, wanted.model)
    chat = chat_body(wanted, [*history, *items], model, ignored)
    if is_flat or wanted.decoding is not None:
        chat = decoded(chat, wanted, config.decoding, unused_decoding(model), ignored)
    return items, chat, list(dict.fromkeys(ignored))


def _configured(config: PoolConfig, name: str | None) -> ModelConfig | None:
    """The configured model of a name, or the first of its variants; None where a server has it."""
    model = resolve_model(config, name)
    variants = config.names.variants.get(model)
    return config.models.get(variants[0][0] if variants else model)


@router.post(f"{PATH}/input_tokens")
@flat_router.post(f"{PATH}/input_tokens")
async def count_tokens(request: Request) -> Response:
    """How many tokens the model would read."""
    body = await adapted.read_body(request)
    wanted = check({**body, "stream": False}, is_flat=_is_flat(request))
    _, chat, ignored = await _prepared(request, wanted, is_flat=False)
    is_remote = not counts_tokens(_configured(request.app.state.gateway.config, wanted.model))
    return await adapted.answer_whole(request, TokenCount(chat, ignored, is_remote=is_remote))


@router.post(f"{PATH}/compact")
async def compact(request: Request) -> Response:
    """Not here: nothing in the pool can shorten a conversation. Clients that ask do it by themselves then."""
    await adapted.read_body(request)
    raise errors.InvalidRequest("conversations are not compacted here", status=404, code="NOT_FOUND")


@router.get(PATH + "/{response}")
@flat_router.get(PATH + "/{response}")
async def retrieve(request: Request, response: str, stream: bool = False) -> Response:
    """A stored response."""
    if stream:
        raise errors.UnsupportedParameter("a stored response is not streamed again", param="stream")
    return _rendered(request, as_it_stands(await _found(request, response)))


@router.delete(PATH + "/{response}")
@flat_router.delete(PATH + "/{response}")
async def delete(request: Request, response: str) -> dict[str, Any]:
    """Forget a stored response. One that runs in the background ends."""
    store: Store = request.app.state.store
    if not await store.delete(response, caller_of(request).principal):
        raise _unknown(response)
    return {"id": response, "object": "response", "deleted": True}


@router.post(PATH + "/{response}/cancel")
@flat_router.post(PATH + "/{response}/cancel")
async def cancel(request: Request, response: str) -> Response:
    """End a response that runs in the background. Any other ends when its client leaves."""
    stored = await _found(request, response)
    status = as_it_stands(stored)["status"]
    if status in RUNNING:
        background: Background = request.app.state.background
        return _rendered(request, await background.cancel(stored))
    if status != "cancelled":
        raise errors.InvalidRequest(f"the response {response!r} does not run: it is {status}")
    return _rendered(request, stored.response)


@router.get(PATH + "/{response}/input_items")
@flat_router.get(PATH + "/{response}/input_items")
async def input_items(
    request: Request,
    response: str,
    after: str | None = None,
    before: str | None = None,
    limit: int = Query(20, ge=1, le=100),
    order: Literal["asc", "desc"] = "desc",
) -> dict[str, Any]:
    """The items that a stored response was asked with, latest first."""
    items = (await _found(request, response)).input
    items = items if order == "asc" else items[::-1]
    ids = [item["id"] for item in items]
    first = ids.index(after) + 1 if after in ids else 0
    items = items[first : ids.index(before) if before in ids else None]
    page = items[:limit]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": len(items) > len(page),
    }


@flat_router.get("/v1/models")
async def loaded_models(request: Request) -> dict[str, Any]:
    """The models that are loaded now, and no others."""
    rows = [row for row in await model_rows(request) if is_loaded(row)]
    return {"object": "list", "data": rows, "models": [row["id"] for row in rows]}


async def _found(request: Request, response: str) -> Stored:
    store: Store = request.app.state.store
    stored = await store.find(response, caller_of(request).principal)
    if stored is None:
        raise _unknown(response)
    return stored


def _unknown(response: str) -> errors.InvalidRequest:
    return errors.InvalidRequest(f"the response {response!r} does not exist", status=404, code="response_not_found")


def _rendered(request: Request, response: dict[str, Any]) -> Response:
    return JSONResponse(flat(response) if _is_flat(request) else response)


def _is_flat(request: Request) -> bool:
    return route_path(request.scope).startswith(f"{FLAT}/")


def install(app: Any, gateway: Gateway) -> None:
    """Add the routes, and what they need, to an application."""
    app.state.store = Store(gateway.config.store)
    app.state.background = Background(gateway, app.state.store)
    app.router.routes[:0] = create_routes
    app.include_router(router)
    app.include_router(flat_router, prefix=FLAT)
