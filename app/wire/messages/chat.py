"""From the body of Messages to the body of a chat. Pure; raises `InvalidRequest` with the field at fault."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from app.wire.messages.blocks import chat_messages, system_text
from app.wire.messages.schema import MessagesRequest, OutputFormat, Prompt, Tool, ToolChoice
from cluster.errors import InvalidRequest, UnsupportedParameter
from deployments.requests import invalid
from deployments.schemas import EXTENSIONS

P = TypeVar("P", bound=Prompt)

#: Tools that the client runs itself, with a schema that only Anthropic's models know, and tools that its servers run.
_CUSTOM = (None, "custom")
#: Efforts that Anthropic has and templates have not.
_EFFORTS = {"xhigh": "high", "max": "high"}


def checked(schema: type[P], body: Mapping[str, Any]) -> P:
    """The body as its schema has it. Raises `InvalidRequest`."""
    try:
        return schema.model_validate(body)
    except ValidationError as error:
        raise invalid(error) from None


def prompt_of(request: Prompt, body: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The part of a chat body that makes its prompt, and what was left out."""
    ignored: list[str] = []
    messages = []
    if system := system_text(request.system, ignored):
        messages.append({"role": "system", "content": system})
    for index, message in enumerate(request.messages):
        messages += chat_messages(message.role, message.content, f"messages.{index}", ignored)
    chat: dict[str, Any] = {"model": request.model, "messages": messages}
    if messages[-1:] and messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls"):
        chat["continue_final_message"] = True
    tools = _tools(request.tools or [], ignored)
    if tools:
        chat["tools"] = tools
    choice = _choice(request.tool_choice)
    # Without tools `auto` asks for nothing, and the rest is told so.
    if choice is not None and (tools or choice not in ("auto", "none")):
        chat["tool_choice"] = choice
    variables = _template_variables(request, ignored)
    if variables:
        chat["chat_template_kwargs"] = variables
    chat.update({name: body[name] for name in EXTENSIONS if name in body})
    return chat, list(dict.fromkeys(ignored))


def chat_of(request: MessagesRequest, body: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The whole chat body, and what was left out of it."""
    chat, ignored = prompt_of(request, body)
    # The clients always send a large number here, and the API itself stops where the context ends.
    chat |= {"max_tokens": request.max_tokens, "clamp_max_tokens": True}
    for name in ("temperature", "top_p", "top_k"):
        value = getattr(request, name)
        if value is not None:
            chat[name] = value
    if request.stop_sequences:
        chat["stop"] = request.stop_sequences
    config = request.output_config
    form = _response_format((config.format if config is not None else None) or request.output_format)
    if form is not None:
        chat["response_format"] = form
    if request.stream:
        chat |= {"stream": True, "stream_options": {"include_usage": True}}
    return chat, ignored


def _tools(tools: list[Tool], ignored: list[str]) -> list[dict[str, Any]]:
    kept = []
    for index, tool in enumerate(tools):
        if tool.type not in _CUSTOM and tool.input_schema is None:
            ignored.append(f"tools.{tool.type}")
            continue
        if not tool.name:
            raise InvalidRequest(f"tools.{index}.name: a tool must have a name", param=f"tools.{index}.name")
        function = {"name": tool.name, "parameters": tool.input_schema or {"type": "object"}}
        if tool.description:
            function["description"] = tool.description
        kept.append({"type": "function", "function": function})
    return kept


def _choice(choice: ToolChoice | None) -> str | dict[str, Any] | None:
    if choice is None:
        return None
    if choice.type == "tool":
        if not choice.name:
            raise InvalidRequest("tool_choice.name: the tool must be named", param="tool_choice.name")
        return {"type": "function", "function": {"name": choice.name}}
    return "required" if choice.type == "any" else choice.type


def _template_variables(request: Prompt, ignored: list[str]) -> dict[str, Any]:
    """What the request says of thinking, for templates that ask. Others do not look at it, and nothing is refused."""
    variables: dict[str, Any] = {}
    thinking, config = request.thinking, request.output_config
    if thinking is not None and thinking.type in ("enabled", "disabled"):
        variables["enable_thinking"] = thinking.type == "enabled"
    if thinking is not None and thinking.budget_tokens is not None:
        ignored.append("thinking.budget_tokens")
    if config is not None and config.effort is not None:
        variables["reasoning_effort"] = _EFFORTS.get(config.effort, config.effort)
    return variables


def _response_format(form: OutputFormat | None) -> dict[str, Any] | None:
    if form is None:
        return None
    if form.type != "json_schema" or form.json_schema is None:
        raise UnsupportedParameter("output_config.format must be a json_schema with a schema", param="output_config")
    return {"type": "json_schema", "json_schema": {"name": "output", "schema": form.json_schema}}
