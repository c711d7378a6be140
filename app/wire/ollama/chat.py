"""From Ollama's bodies to the body of a chat, or of a completion where the prompt is raw. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from app.wire.ollama.schema import ChatRequest, EmbedRequest, GenerateRequest, Message, OllamaRequest, Options, ToolCall
from cluster.errors import InvalidRequest, UnsupportedParameter
from deployments.requests import invalid
from deployments.schemas import CHAT, COMPLETIONS, EXTENSIONS

B = TypeVar("B", bound=BaseModel)

#: A duration of Go: `5m`, `1h30m`, `-1s`.
_DURATION = re.compile(r"-?(?:[0-9]+(?:\.[0-9]*)?(?:ns|us|µs|ms|s|m|h))+")
_UNITS_S = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
#: Beginnings of images in base64: their kinds, which Ollama's clients do not tell.
_IMAGES = {"iVBORw": "png", "/9j/": "jpeg", "R0lGOD": "gif", "UklGR": "webp"}


def checked(schema: type[B], body: Mapping[str, Any]) -> B:
    """The body as its schema has it. Raises `InvalidRequest`."""
    try:
        return schema.model_validate(body)
    except ValidationError as error:
        raise invalid(error) from None


def seconds(value: float | str | None) -> float | None:
    """`keep_alive` in seconds, -1 for no end: a number, or a duration as Go writes it. Raises `InvalidRequest`."""
    if value is None:
        return None
    try:
        number = float(value)
    except ValueError:
        if not _DURATION.fullmatch(str(value)):
            message = f"keep_alive: {value!r} is no duration: give seconds, or a text like 5m"
            raise InvalidRequest(message, param="keep_alive") from None
        parts = re.findall(r"([0-9.]+)([a-zµ]+)", str(value))
        number = sum(float(count) * _UNITS_S[unit] for count, unit in parts) * (-1 if str(value)[0] == "-" else 1)
    if number != number or number == float("inf"):
        raise InvalidRequest("keep_alive: must be a number of seconds", param="keep_alive")
    return -1.0 if number < 0 else number


def chat_of(request: ChatRequest, body: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The chat body of `/api/chat`, and what was left out of it."""
    chat, ignored = _shared(request, body)
    chat["messages"] = messages_of(request.messages or [])
    if request.messages and request.messages[-1].role == "assistant" and not request.messages[-1].tool_calls:
        chat["continue_final_message"] = True
    tools = [tool for tool in request.tools or [] if tool.get("type", "function") == "function"]
    ignored += [f"tools.{tool['type']}" for tool in request.tools or [] if tool not in tools]
    if tools:
        chat["tools"] = [{**tool, "type": "function"} for tool in tools]
    return chat, ignored


def generate_of(request: GenerateRequest, body: Mapping[str, Any]) -> tuple[str, dict[str, Any], list[str]]:
    """The path and the body of `/api/generate`, and what was left out: a chat, or a completion of a raw prompt."""
    for name in ("template", "context"):
        if getattr(request, name):
            raise UnsupportedParameter(f"{name} is not supported: use raw, or /api/chat", param=name)
    chat, ignored = _shared(request, body)
    if request.raw or request.suffix:
        for name in ("images", "logprobs"):
            if getattr(request, name):
                raise UnsupportedParameter(f"{name}: not with raw or suffix", param=name)
        chat.pop("chat_template_kwargs", None)
        chat["prompt"] = request.prompt or ""
        if request.suffix:
            chat["suffix"] = request.suffix
        return COMPLETIONS, chat, ignored
    asked = Message(role="user", content=request.prompt, images=request.images)
    system = [Message(role="system", content=request.system)] if request.system else []
    chat["messages"] = messages_of([*system, asked])
    return CHAT, chat, ignored


def embeddings_of(request: EmbedRequest, body: Mapping[str, Any]) -> dict[str, Any]:
    """The body of `/v1/embeddings` for an embedding."""
    given = request.prompt if request.input is None else request.input
    wanted: dict[str, Any] = {"model": request.model, "input": given, "encoding_format": "float"}
    if request.dimensions is not None:
        wanted["dimensions"] = request.dimensions
    return wanted | _extensions(request.keep_alive, body)


def messages_of(messages: list[Message]) -> list[dict[str, Any]]:
    """A conversation in a chat's words. Ollama's calls have no ids, so results belong to calls in their order."""
    made: list[dict[str, Any]] = []
    waiting: list[tuple[str, str]] = []
    calls = 0
    for message in messages:
        said: dict[str, Any] = {"role": message.role, "content": message.content or ""}
        if message.images:
            parts = [{"type": "image_url", "image_url": {"url": _image_url(each)}} for each in message.images]
            said["content"] = [*([{"type": "text", "text": message.content}] if message.content else []), *parts]
        if message.thinking:
            said["reasoning_content"] = message.thinking
        if message.tool_calls:
            # Nine letters and digits, which is what the strictest templates want of an id.
            ids = [call.id or f"call{calls + index:05}" for index, call in enumerate(message.tool_calls)]
            calls += len(ids)
            said["tool_calls"] = [_call(name, call) for name, call in zip(ids, message.tool_calls, strict=True)]
            waiting = [(call.function.name, name) for name, call in zip(ids, message.tool_calls, strict=True)]
        if message.role == "tool":
            at = next((each for each in waiting if each[0] == message.tool_name), waiting[0] if waiting else None)
            if at is not None:
                waiting.remove(at)
            said["tool_call_id"] = message.tool_call_id or (at[1] if at else f"call{calls:05}")
        made.append(said)
    return made


def _call(name: str, call: ToolCall) -> dict[str, Any]:
    given = call.function.arguments
    arguments = given if isinstance(given, str) else json.dumps(given or {}, ensure_ascii=False)
    return {"id": name, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}


def _image_url(image: str) -> str:
    kind = next((kind for start, kind in _IMAGES.items() if image.startswith(start)), "png")
    return f"data:image/{kind};base64,{image}"


def _shared(request: OllamaRequest, body: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """All but the prompt, and the options that were left out: what is fixed when a model loads, or is not known."""
    options = request.options or Options()
    chat: dict[str, Any] = {"model": request.model, "clamp_max_tokens": True}
    if options.num_predict > 0:
        chat["max_tokens"] = options.num_predict
    for name in ("temperature", "top_p", "min_p", "repeat_penalty", "presence_penalty", "frequency_penalty"):
        chat[name] = getattr(options, name)
    chat["top_k"] = max(0, options.top_k)
    if options.seed >= 0:
        chat["seed"] = options.seed
    if options.stop:
        chat["stop"] = options.stop
    if request.format:
        named = {"name": "format", "schema": request.format}
        is_any = request.format == "json"
        chat["response_format"] = {"type": "json_object"} if is_any else {"type": "json_schema", "json_schema": named}
    variables = _template_variables(request.think)
    if variables:
        chat["chat_template_kwargs"] = variables
    if request.logprobs:
        chat |= {"logprobs": True, "top_logprobs": request.top_logprobs or 0}
    if request.stream is not False:
        chat |= {"stream": True, "stream_options": {"include_usage": True}}
    chat |= _extensions(request.keep_alive, body)
    return chat, [f"options.{name}" for name in options.model_extra or ()]


def _extensions(keep_alive: float | str | None, body: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: body[name] for name in EXTENSIONS if name in body and name != "keep_alive"}
    stays_s = seconds(keep_alive)
    return kept if stays_s is None else {**kept, "keep_alive": stays_s}


def _template_variables(think: bool | str | None) -> dict[str, Any]:
    if think is None:
        return {}
    return {"enable_thinking": think is not False} | ({"reasoning_effort": think} if isinstance(think, str) else {})
