"""From a client's body to the `Request` that travels to the ledger, and the body that goes to the engine.

The model is looked at first: whatever else is wrong, a client that named none, or an unknown one, hears that. The
schemas (`schemas.py`) check the rest. Everything here refuses before a lease is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from cluster import errors
from cluster.config import Caller, PoolConfig
from cluster.request import Request
from deployments.schemas import CHAT, COMPLETIONS, EXTENSIONS, MAX_SEQUENCES, SCHEMAS, PoolRequest, parse_priority

__all__ = [
    "CHAT",
    "COMPLETIONS",
    "invalid",
    "is_allowed",
    "model_of",
    "parse_request",
    "resolve_model",
    "unknown_model",
]

#: Who calls from inside the cluster.
TRUSTED = Caller()
#: The longest name of a model, in characters.
MAX_NAME = 512


def resolve_model(config: PoolConfig, name: str | None) -> str:
    """The model's id for the name in a request. Raises `ModelRequired` or `ModelNotFound`.

    In a pool with external servers the ledger has the last word on names that are not configured.
    """
    name = name or config.default_model
    if not name:
        raise errors.ModelRequired(
            "the request names no model", param="model", hint='set "model" to an id that GET /v1/models lists'
        )
    model = config.resolve(name)
    if model is None:
        raise unknown_model(name, list(config.models))
    return model


def unknown_model(name: str, available: list[str]) -> errors.ModelNotFound:
    """The contract's answer to a model that nobody knows."""
    return errors.ModelNotFound(
        f"the model {name!r} does not exist",
        param="model",
        available_models=available,
        install_endpoint="/v1/models/install",
    )


def is_allowed(config: PoolConfig, caller: Caller, model: str) -> bool:
    """Whether the caller's key is good for a model, by the name that `resolve_model` gives."""
    return not caller.models or model in {config.resolve(name) or name for name in caller.models}


def model_of(config: PoolConfig, body: Any, caller: Caller = TRUSTED) -> str:
    """The id of the model that a body names and its sender may use.

    Raises `InvalidRequest` where it is no object, `ModelRequired`, `ModelNotFound` or `Forbidden`.
    """
    if not isinstance(body, dict):
        raise errors.InvalidRequest("the body must be a JSON object")
    name = body.get("model")
    if name is not None and not isinstance(name, str):
        raise errors.InvalidRequest("model: must be a string", param="model")
    if name is not None and not (name.isprintable() and len(name) <= MAX_NAME):
        # It may be a server's, and so goes to the ledger as it is.
        raise errors.InvalidRequest("model: no model has such a name", param="model")
    try:
        model = resolve_model(config, name)
    except errors.ModelNotFound:
        raise unknown_model(str(name), [each for each in config.models if is_allowed(config, caller, each)]) from None
    if not is_allowed(config, caller, model):
        message = f"the key {caller.principal!r} is not good for the model {model!r}"
        raise errors.Forbidden(message, param="model", available_models=list(caller.models))
    return model


def refuse_unserved(config: PoolConfig, name: str, *, may_be_remote: bool) -> None:
    """Refuse what would never be served, before it waits for anything.

    Raises `FormatNotSupported`, or `Forbidden` where a remote API would have to be allowed.
    """
    model = config.models.get(name)
    if model is None:
        return
    if model.formats and model.format not in model.formats:
        raise errors.FormatNotSupported(
            f"{model.backend} does not read models in the format {model.format}",
            param="model",
            preferred_formats=list(model.formats),
        )
    if model.is_remote and not may_be_remote:
        raise errors.Forbidden(
            f"the model {name!r} is a remote API's: only requests with allow_remote: true go there",
            param="allow_remote",
            code="remote_execution_disallowed",
        )


def parse_request(
    config: PoolConfig,
    path: str,
    body: Any,
    *,
    request_id: str,
    headers: Mapping[str, str] | None = None,
    caller: Caller = TRUSTED,
) -> tuple[Request, dict[str, Any]]:
    """The request as it travels, and its body for the engine, without the pool's own fields.

    `headers` may carry `x-priority` and `x-request-timeout`; fields of the body win. What the caller's key does not
    allow is brought down to what it does (class, stay), or refused (model). Raises `ModelRequired`, `ModelNotFound` or
    `Forbidden`, and then `InvalidRequest` with the field at fault.
    """
    model = model_of(config, body, caller)
    try:
        checked = SCHEMAS[path].model_validate(body)
    except ValidationError as error:
        raise invalid(error) from None
    refuse_unserved(config, model, may_be_remote=bool(checked.allow_remote))
    if checked.sequences > MAX_SEQUENCES:
        raise errors.InvalidRequest(f"n choices of all prompts are more than {MAX_SEQUENCES}", param="n")
    request = _request(config, path, model, checked, request_id, headers, caller)
    return request, {"model": model, **{key: value for key, value in body.items() if key not in EXTENSIONS}}


def parse_raw(
    config: PoolConfig,
    path: str,
    model: str | None,
    *,
    request_id: str,
    headers: Mapping[str, str] | None = None,
    caller: Caller = TRUSTED,
) -> Request:
    """The request for a path that goes to its engine unread. Raises as `parse_request` does."""
    name = model_of(config, {"model": model}, caller)
    refuse_unserved(config, name, may_be_remote=False)
    return _request(config, path, name, PoolRequest(), request_id, headers, caller)


def patient(config: PoolConfig, request: Request) -> Request:
    """The request as one that waits for as long as its client stays; who says how long he will wait waits no longer."""
    return request._replace(is_patient=request.timeout_s >= config.request_timeout_s(request.model))


def _request(
    config: PoolConfig,
    path: str,
    model: str,
    checked: PoolRequest,
    request_id: str,
    headers: Mapping[str, str] | None,
    caller: Caller,
) -> Request:
    priority = checked.priority or _header(headers, "x-priority", parse_priority) or 2
    longest_s = config.request_timeout_s(model)
    return Request(
        id=request_id,
        model=model,
        path=path,
        priority=max(priority, caller.best_priority),
        timeout_s=min(longest_s, checked.timeout_s or _header(headers, "x-request-timeout", _seconds) or longest_s),
        keep_alive_s=caller.keep_alive_s(checked.keep_alive, config.max_keep_alive),
        slots=checked.sequences,
        principal=caller.principal,
        trace=request_id,
    )


def _header(headers: Mapping[str, str] | None, name: str, parse: Any) -> Any:
    value = (headers or {}).get(name)
    if value is None:
        return None
    try:
        return parse(value)
    except ValueError as error:
        raise errors.InvalidRequest(f"{name}: {error}", param=name) from None


def _seconds(value: str) -> float:
    seconds = float(value)
    if not 0 < seconds < float("inf"):
        raise ValueError("must be a positive number of seconds")
    return seconds


def invalid(error: ValidationError, status: int = 400) -> errors.InvalidRequest:
    """The first mistake, in OpenAI's terms: `messages.0.role`, without the union members that Pydantic names."""
    mistakes = [(_field(item["loc"]), item) for item in error.errors(include_url=False, include_input=False)]
    field, first = mistakes[0]
    # Of a union every member complains: the one whose type was right says what is really wrong.
    same = [item for other, item in mistakes if other[: len(field)] == field]
    told = next((item for item in same if not item["type"].endswith("_type")), first)
    message = told["msg"].removeprefix("Value error, ")
    return errors.InvalidRequest(f"{field or 'body'}: {message}", param=field or None, status=status)


def _field(location: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in location if isinstance(part, int) or not _is_union_member(part))


def _is_union_member(part: str) -> bool:
    return part in {"str", "int", "[key]"} or part.startswith(("list[", "dict[", "constrained-"))
