"""Checks a client's body and splits it: what the engine gets, and what only the pool reads.

The schema checks types and bounds of the fields that OpenAI documents; whether an engine can honour a field is the
engine's own decision. Everything here refuses before a lease is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from cluster import errors
from cluster.config import Caller, PoolConfig
from deployments.gateway import Ask

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"

PRIORITIES = {"high": 1, "medium": 2, "low": 3, "1": 1, "2": 2, "3": 3}
#: Who calls from inside the cluster.
TRUSTED = Caller()
#: The pool's own fields, which no engine sees.
EXTENSIONS = ("priority", "keep_alive", "allow_remote", "timeout_s")


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class Message(_Part):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[dict[str, Any]] | None = None


class StreamOptions(_Part):
    include_usage: bool | None = None


class _Request(_Part):
    """What chat and completions share."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    priority: int | None = None
    keep_alive: Annotated[float, Field(ge=-1)] | None = None
    allow_remote: bool | None = None
    timeout_s: Annotated[float, Field(gt=0)] | None = None

    @field_validator("priority", mode="before")
    @classmethod
    def _class_of(cls, value: Any) -> int | None:
        return None if value is None else parse_priority(value)


class ChatRequest(_Request):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None


class CompletionRequest(_Request):
    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    suffix: str | None = None


SCHEMAS: dict[str, type[_Request]] = {CHAT: ChatRequest, COMPLETIONS: CompletionRequest}


def parse_priority(value: Any) -> int:
    """1, 2 or 3 from `high|medium|low` in any case or the numbers themselves. Raises `ValueError`."""
    key = str(value).lower()
    if isinstance(value, bool) or key not in PRIORITIES:
        raise ValueError("must be high, medium or low, or 1, 2 or 3")
    return PRIORITIES[key]


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


def parse_ask(
    config: PoolConfig,
    path: str,
    body: Any,
    *,
    request_id: str,
    headers: Mapping[str, str] | None = None,
    caller: Caller = TRUSTED,
) -> Ask:
    """A checked request. `headers` may carry `x-priority` and `x-request-timeout`; fields of the body win.

    What the caller's key does not allow is brought down to what it does (class, stay), or refused (model). Raises
    `InvalidRequest` with the field at fault, `ModelRequired`, `ModelNotFound` or `Forbidden`.
    """
    if not isinstance(body, dict):
        raise errors.InvalidRequest("the body must be a JSON object")
    try:
        checked = SCHEMAS[path].model_validate(body)
    except ValidationError as error:
        raise _invalid(error) from None
    model = resolve_model(config, checked.model)
    if not is_allowed(config, caller, model):
        message = f"the key {caller.principal!r} is not good for the model {model!r}"
        raise errors.Forbidden(message, param="model", available_models=list(caller.models))
    priority = checked.priority or _header(headers, "x-priority", parse_priority) or 2
    longest_s = config.request_timeout_s(model)
    return Ask(
        model=model,
        path=path,
        body={"model": model, **{key: value for key, value in body.items() if key not in EXTENSIONS}},
        request_id=request_id,
        priority=max(priority, caller.best_priority),
        timeout_s=min(longest_s, checked.timeout_s or _header(headers, "x-request-timeout", _seconds) or longest_s),
        keep_alive_s=caller.keep_alive_s(checked.keep_alive, config.max_keep_alive),
        principal=caller.principal,
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


def _invalid(error: ValidationError) -> errors.InvalidRequest:
    """The first mistake, in OpenAI's terms: `messages.0.role`, without the union members that Pydantic names."""
    first = error.errors()[0]
    field = [part for part in first["loc"] if isinstance(part, int) or not _is_union_member(str(part))]
    param = ".".join(map(str, field)) or None
    return errors.InvalidRequest(f"{param or 'body'}: {first['msg']}", param=param)


def _is_union_member(part: str) -> bool:
    return part in {"str", "int"} or part.startswith(("list[", "dict["))
