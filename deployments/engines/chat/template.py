"""A model's chat template: from OpenAI messages to the prompt text, the way the model was trained.

The template is a program that came with the weights, so it runs in jinja2's sandbox. Its environment is the one that
templates are written for: trimmed blocks, `tojson`, `raise_exception`, `strftime_now`, loop controls.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cluster.errors import InvalidRequest, ModelUnavailable, UnsupportedParameter
from deployments.engines.chat.gemma4 import GEMMA4
from deployments.engines.chat.thinking import is_marked_by_tokens
from deployments.engines.chat.tools import call_as_text, describe_tools
from deployments.engines.chat.translation import TRANSLATION

#: Templates for models that bring none; `prompt_format` names one of them, or is itself a Jinja template.
NAMED_FORMATS = {
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else 'user') + '\\n'"
        " + m.content | trim + '<end_of_turn>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
    ),
    "gemma4_template": GEMMA4,
    "llama3": (
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n'"
        " + m.content | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    "translategemma_template": TRANSLATION,
    "plain": (
        "{% for m in messages %}{{ m.role | capitalize + ': ' + m.content + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
    ),
}


class ChatTemplate:
    """A compiled template. Rendering is pure and thread-safe."""

    def __init__(self, source: str, *, bos_token: str = "", eos_token: str = "") -> None:
        """Raises `ModelUnavailable` when the template does not compile."""
        environment = _environment()
        try:
            self._template = environment.from_string(source)
            self._variables = meta.find_undeclared_variables(environment.parse(source))
        except jinja2.TemplateError as error:
            raise ModelUnavailable(f"the chat template does not compile: {error}") from error
        #: Its model marks what it thinks with control tokens, which are no text unless they are asked for.
        self.shows_control_tokens = is_marked_by_tokens(source)
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}

    @property
    def knows_tools(self) -> bool:
        return "tools" in self._variables

    def knows(self, variable: str) -> bool:
        """Whether the template reads this variable, so that giving it a value changes the prompt."""
        return variable in self._variables

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, Any] | None = None,
        *,
        continues: bool = False,
    ) -> str:
        """The prompt for an answer to `messages`. Raises `InvalidRequest` when the template refuses them.

        With `continues` the answer goes on where the last message ends, if that is the assistant's text.
        """
        last = messages[-1] if continues else {}
        if last.get("role") == "assistant" and not last.get("tool_calls"):
            return self.render(messages[:-1], tools, variables) + message_text(last.get("content"))
        plain = [_plain_message(message, structured=self.knows_tools) for message in messages]
        if tools and not self.knows_tools:
            plain = _with_system_text(plain, describe_tools(tools))
        try:
            return self._render(plain, tools, variables or {})
        except jinja2.TemplateError as error:
            # Some models know no system role, others one at the beginning only; its text then goes where they were
            # trained to expect it.
            for start in (1, 0):
                if any(message["role"] == "system" for message in plain[start:]):
                    with contextlib.suppress(jinja2.TemplateError):
                        return self._render(_without_system(plain, start), tools, variables or {})
            raise InvalidRequest(
                f"the model's chat template refuses these messages: {error}", param="messages"
            ) from error
        except (TypeError, ValueError, KeyError) as error:
            raise InvalidRequest(
                f"the chat template cannot render these messages: {error}", param="messages"
            ) from error

    def _render(
        self, messages: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]
    ) -> str:
        given = {**variables, **self._tokens, "messages": messages, "add_generation_prompt": True}
        return self._template.render(**given, tools=list(tools) or None)


def choose_template(prompt_format: str | None, own: str | None) -> str | None:
    """The template's source: `prompt_format` by name or as Jinja, else the model's own. Raises `ModelUnavailable`."""
    if prompt_format is None:
        return own
    if prompt_format in NAMED_FORMATS:
        return NAMED_FORMATS[prompt_format]
    if "{{" in prompt_format or "{%" in prompt_format:
        return prompt_format
    known = ", ".join(sorted(NAMED_FORMATS))
    raise ModelUnavailable(f"unknown prompt_format {prompt_format!r}: give one of {known}, or a Jinja template")


def message_text(content: Any) -> str:
    """The text of a message's content. Raises `UnsupportedParameter` for images, audio and files."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequest("a message's content must be a string or a list of parts", param="messages")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, Mapping) else None
        if kind not in ("text", "refusal"):
            raise UnsupportedParameter(
                f"content parts of type {kind!r} are not supported by this model", param="messages"
            )
        if not isinstance(text, str):
            raise InvalidRequest("a text part must have a text", param="messages")
        texts.append(text)
    return "".join(texts)


def _plain_message(message: Any, *, structured: bool) -> dict[str, Any]:
    """A message as templates expect it: text content, and tool calls as objects, or as text if not `structured`."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InvalidRequest("every message must be an object with a role", param="messages")
    role = "system" if message["role"] == "developer" else message["role"]
    if role not in ("system", "user", "assistant", "tool"):
        raise InvalidRequest(f"unknown message role {role!r}", param="messages")
    plain = {**message, "role": role, "content": message_text(message.get("content"))}
    calls = message.get("tool_calls") or []
    if calls and structured:
        plain["tool_calls"] = [_with_parsed_arguments(call) for call in calls]
    elif calls:
        plain["content"] = "\n".join([*filter(None, [plain["content"]]), *map(call_as_text, calls)])
        del plain["tool_calls"]
    if role == "tool" and not structured:
        plain["role"] = "user"
        plain["content"] = f"<tool_response>\n{plain['content']}\n</tool_response>"
    return plain


def _with_parsed_arguments(call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise InvalidRequest("a tool call must have a function", param="messages")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError:
            raise InvalidRequest("a tool call's arguments must be JSON", param="messages") from None
    return {**call, "function": {**function, "arguments": arguments}}


def _with_system_text(messages: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    if messages and messages[0]["role"] == "system":
        first = {**messages[0], "content": f"{messages[0]['content']}\n\n{text}".strip()}
        return [first, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def _without_system(messages: list[dict[str, Any]], start: int) -> list[dict[str, Any]]:
    """System messages from `start` on as the user's, joined with the user's own beside them."""
    kept = messages[:start]
    was_system = False
    for message in messages[start:]:
        is_system = message["role"] == "system"
        before = kept[-1] if len(kept) > start else {}
        if before.get("role") == "user" and (is_system or (was_system and message["role"] == "user")):
            kept[-1] = {**before, "content": f"{before['content']}\n\n{message['content']}"}
        else:
            kept.append({**message, "role": "user"} if is_system else message)
        was_system = is_system
    return kept


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks what a model learns from; for a prompt it means nothing."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it as an instance variable)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    # jinja2's own filter escapes HTML characters, which would put \u003c into the prompt.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
