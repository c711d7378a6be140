"""From a Responses request to the chat body it stands for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from app.wire.responses.items import messages_of
from app.wire.responses.schema import PASSED, ResponsesRequest
from cluster.config import ModelConfig
from cluster.config.pool import Decoding
from cluster.errors import InvalidRequest, UnsupportedParameter

#: Named as a model's `prompt_format`, it takes a text and two languages, and nothing else.
TRANSLATION = "translategemma_template"
LOGPROBS = "message.output_text.logprobs"


def chat_body(
    request: ResponsesRequest, items: Sequence[Mapping[str, Any]], model: ModelConfig | None, ignored: list[str]
) -> dict[str, Any]:
    """The chat body of a request and its whole conversation. What is left out is named in `ignored`.

    `model` is the configured one, None where an external server has it. Raises `InvalidRequest`.
    """
    body: dict[str, Any] = {name: request.extras[name] for name in PASSED if name in request.extras}
    body["model"] = request.model
    body["temperature"], body["top_p"] = request.temperature, request.top_p
    body["max_tokens"] = request.max_output_tokens
    if model is not None and model.prompt_format == TRANSLATION:
        body["messages"] = [{"role": "user", "content": _source_text(items)}]
        body["chat_template_kwargs"] = _languages(request)
    else:
        body["messages"] = messages_of(request.instructions, items)
        body |= _tools(request, ignored)
    if not body["messages"]:
        raise InvalidRequest("input: holds no message", param="input")
    body |= _format(request, ignored) | _reasoning(request, model) | _logprobs(request)
    body["clamp_max_tokens"] = True
    if request.stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return {name: value for name, value in body.items() if value is not None}


def decoded(
    body: dict[str, Any],
    request: ResponsesRequest,
    defaults: Decoding,
    unused: frozenset[str],
    ignored: list[str],
) -> dict[str, Any]:
    """The chat body with the pool dialect's decoding: its own fields win, then the official ones, then `defaults`.

    The model cannot use the `unused` fields.
    """
    given = request.decoding.model_dump(exclude_none=True) if request.decoding is not None else {}
    named = request.decoding.model_fields_set if request.decoding is not None else set()
    ignored += [f"decoding.{name}" for name in sorted(unused & named)]
    base = {**defaults.model_dump(), "stop": list(defaults.stop)}
    merged = {**base, **{name: value for name, value in body.items() if name in base}, **given}
    merged = {name: value for name, value in merged.items() if name not in unused}
    return {**body, **merged}


def _source_text(items: Sequence[Mapping[str, Any]]) -> str:
    messages = messages_of(None, items)
    content = messages[0]["content"] if len(messages) == 1 and messages[0]["role"] == "user" else None
    if not isinstance(content, str):
        message = f"{TRANSLATION} takes the source text and nothing else"
        raise InvalidRequest(f"input: {message}", param="input", status=422)
    return content


def _languages(request: ResponsesRequest) -> dict[str, str]:
    codes = {name: getattr(request, name) for name in ("source_lang_code", "target_lang_code")}
    for name, code in codes.items():
        if code is None:
            raise InvalidRequest(f"{name}: {TRANSLATION} needs it", param=name, status=422)
    return codes


def _tools(request: ResponsesRequest, ignored: list[str]) -> dict[str, Any]:
    """Functions, and which of them may or must be called. Tools that only a hosted service has are left out."""
    given = functions(request, ignored)
    choice = request.tool_choice
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        listed = choice.get("tools")
        named = [tool.get("name") for tool in listed if isinstance(tool, dict)] if isinstance(listed, list) else []
        given = [tool for tool in given if tool["name"] in named]
        choice = choice.get("mode", "auto")
        if choice not in ("auto", "required"):
            raise InvalidRequest("tool_choice.mode: must be auto or required", param="tool_choice")
    elif isinstance(choice, dict) and choice.get("type") == "function":
        choice = {"type": "function", "function": {"name": choice.get("name")}}
    elif isinstance(choice, dict):
        ignored.append("tool_choice")
        choice = None
    if not given:
        if isinstance(choice, dict):
            raise InvalidRequest("tool_choice needs tools", param="tool_choice")
        return {}
    tools = [{"type": "function", "function": _function(tool)} for tool in given]
    return {"tools": tools, "tool_choice": choice, "parallel_tool_calls": request.parallel_tool_calls}


def functions(request: ResponsesRequest, ignored: list[str]) -> list[dict[str, Any]]:
    """The tools that are functions, as the client gave them. Raises `InvalidRequest` for one without a name."""
    kept = []
    for index, tool in enumerate(request.tools or []):
        kind = tool.get("type")
        if kind != "function":
            ignored.append(f"tools.{kind if isinstance(kind, str) else index}")
        elif not isinstance(tool.get("name"), str):
            raise InvalidRequest(f"tools.{index}.name: must be a string", param=f"tools.{index}.name")
        else:
            kept.append(tool)
    return kept


def _function(tool: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tool[name] for name in ("name", "description", "parameters", "strict") if tool.get(name) is not None}


def _format(request: ResponsesRequest, ignored: list[str]) -> dict[str, Any]:
    if request.text is None:
        return {}
    if request.text.verbosity not in (None, "medium"):
        ignored.append("text.verbosity")
    form = request.text.format
    kind = None if form is None else form.get("type")
    if form is None or kind == "text":
        return {}
    if kind == "json_object":
        return {"response_format": {"type": "json_object"}}
    if kind != "json_schema":
        raise UnsupportedParameter(f"text.format of type {kind!r} is not supported", param="text.format")
    if not isinstance(form.get("schema"), dict):
        raise InvalidRequest("text.format.schema: must be a JSON schema", param="text.format.schema")
    inner = {name: form[name] for name in ("name", "description", "schema", "strict") if form.get(name) is not None}
    return {"response_format": {"type": "json_schema", "json_schema": inner}}


def _reasoning(request: ResponsesRequest, model: ModelConfig | None) -> dict[str, Any]:
    """How much a model is to think. A template that knows nothing of it does as it always does."""
    effort = request.reasoning.effort if request.reasoning is not None else None
    if effort is None:
        return {}
    if model is None:
        return {"reasoning_effort": effort}
    known = request.extras.get("chat_template_kwargs")
    variables = {"reasoning_effort": effort, "enable_thinking": effort != "none"}
    return {"chat_template_kwargs": {**variables, **(known if isinstance(known, dict) else {})}}


def _logprobs(request: ResponsesRequest) -> dict[str, Any]:
    if LOGPROBS not in (request.include or []) and not request.top_logprobs:
        return {}
    return {"logprobs": True, "top_logprobs": request.top_logprobs}
