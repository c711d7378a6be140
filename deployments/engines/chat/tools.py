"""Tool calls with models that only know text: how tools are described, forced, and found in an answer.

The form of a call is that of the Hermes models, which most open models were trained on or imitate:
`<tool_call>{"name": …, "arguments": {…}}</tool_call>`. A choice that must be a call is forced by a grammar made from
the functions' own schemas, so that a model of any size gives a valid one.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, Literal

from cluster.errors import InvalidRequest, UnsupportedParameter

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_HEADER_START = '{"name":"'
_HEADER = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*')


@dataclass(frozen=True, slots=True)
class ToolPlan:
    """The tools of one request: which may be called, and whether one must be."""

    tools: tuple[Mapping[str, Any], ...] = ()
    mode: Literal["none", "auto", "forced"] = "none"
    #: With "forced": the functions of which one must be called.
    candidates: tuple[Mapping[str, Any], ...] = ()

    def grammar_schema(self) -> dict[str, Any]:
        """The JSON schema of a call to one of the candidates."""
        calls = [
            {
                "type": "object",
                "properties": {
                    "name": {"const": function["name"]},
                    "arguments": function.get("parameters") or {"type": "object"},
                },
                "required": ["name", "arguments"],
            }
            for function in self.candidates
        ]
        if len(calls) == 1:
            return calls[0]
        return {"oneOf": calls}


@dataclass(slots=True)
class ToolCall:
    id: str
    name: str
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class ToolDelta:
    """A piece of the call at `position`: its start (with `id` and `name`) or more of its arguments."""

    position: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


def tool_plan(body: Mapping[str, Any]) -> ToolPlan:
    """What `tools` and `tool_choice` come to. Raises `InvalidRequest` where they contradict each other."""
    tools = body.get("tools") or []
    functions = [_function(tool) for tool in tools]
    choice = body.get("tool_choice")
    if choice in ("none", None) and not tools:
        return ToolPlan()
    if choice == "none":
        return ToolPlan(tuple(tools), "none")
    if not tools:
        raise InvalidRequest("tool_choice needs tools", param="tool_choice")
    if choice in ("auto", None):
        return ToolPlan(tuple(tools), "auto")
    if choice == "required":
        return ToolPlan(tuple(tools), "forced", tuple(functions))
    named = choice.get("function") if isinstance(choice, Mapping) and choice.get("type") == "function" else None
    name = named.get("name") if isinstance(named, Mapping) else None
    chosen = [function for function in functions if function["name"] == name]
    if not chosen:
        raise InvalidRequest("tool_choice must be none, auto, required or name one of the tools", param="tool_choice")
    return ToolPlan(tuple(tools), "forced", (chosen[0],))


def _function(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    if tool.get("type") != "function":
        raise UnsupportedParameter("only tools of type function are supported", param="tools")
    function = tool.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InvalidRequest("a tool's function must have a name", param="tools")
    if not isinstance(function.get("parameters", {}), Mapping | None):
        raise InvalidRequest("a function's parameters must be a JSON schema", param="tools")
    return function


def describe_tools(tools: Sequence[Mapping[str, Any]]) -> str:
    """The system text for models whose own template knows no tools."""
    listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    return (
        f"You can call these functions, given as JSON schemas:\n<tools>\n{listed}\n</tools>\n"
        "To call one, answer with nothing but its name and arguments in this form:\n"
        f'{OPEN}\n{{"name": "function name", "arguments": {{"argument": "value"}}}}\n{CLOSE}'
    )


def call_as_text(call: Mapping[str, Any]) -> str:
    """An earlier call of the conversation, written the way the model would have."""
    function = call.get("function") or {}
    arguments = function.get("arguments") or "{}"
    return f'{OPEN}\n{{"name": {json.dumps(function.get("name"))}, "arguments": {arguments}}}\n{CLOSE}'


class _State(Enum):
    TEXT = auto()
    HEADER = auto()
    ARGUMENTS = auto()
    CLOSING = auto()


@dataclass(slots=True)
class ToolParser:
    """Splits a streamed answer into text and tool calls. Feed it with `push`, end with `finish`.

    Text is shown as it comes, except for a tail that may begin a call. A call's arguments are passed on as they
    come, too, once its name is known. What looks like a call but does not name a known function stays text.
    """

    names: frozenset[str]
    calls: list[ToolCall] = field(default_factory=list)
    _state: _State = _State.TEXT
    _held: str = ""
    _shown: bool = False
    _tag: str = ""
    _end: _JsonEnd | None = None

    def push(self, text: str) -> list[str | ToolDelta]:
        """What this piece of text releases, in order: shown text as `str`, calls as `ToolDelta`."""
        self._held += text
        out: list[str | ToolDelta] = []
        steps = {
            _State.TEXT: self._text,
            _State.HEADER: self._header,
            _State.ARGUMENTS: self._arguments,
            _State.CLOSING: self._closing,
        }
        while steps[self._state](out):
            pass
        return out

    def finish(self) -> list[str | ToolDelta]:
        """The rest: a held text that turned out to be no call."""
        held = self._tag + self._held if self._state is _State.HEADER else self._held
        self._held = ""
        return [held] if held.strip() and self._state in (_State.TEXT, _State.HEADER) else []

    # Each step uses up some of the held text, and says whether another may follow or more text is needed.

    def _text(self, out: list[str | ToolDelta]) -> bool:
        if not self._shown and not self.calls and self._held.lstrip()[:1] == "{":
            # Llama's models write the bare object; only its header tells it from an answer in JSON.
            self._state, self._tag = _State.HEADER, ""
            return True
        before, tag, after = self._held.partition(OPEN)
        if tag:
            self._show(before, out)
            self._held, self._state, self._tag = after, _State.HEADER, OPEN
            return True
        keep = _partial(self._held, OPEN)
        shown = self._held[: len(self._held) - keep]
        if shown.strip() or self._shown:
            self._show(shown, out)
            self._held = self._held[len(shown) :]
        return False

    def _show(self, text: str, out: list[str | ToolDelta]) -> None:
        # White space around calls is not an answer.
        if text.strip() or (text and self._shown and not self.calls):
            self._shown = True
            out.append(text)

    def _header(self, out: list[str | ToolDelta]) -> bool:
        header = _HEADER.match(self._held)
        if header is None:
            start = "".join(self._held[:64].split())[: len(_HEADER_START)]
            if _HEADER_START.startswith(start) and CLOSE not in self._held and len(self._held) < 1024:
                return False
            return self._give_up(out)
        name = json.loads(header[1])
        if name not in self.names:
            return self._give_up(out)
        call = ToolCall(f"call_{uuid.uuid4().hex[:24]}", name)
        self.calls.append(call)
        out.append(ToolDelta(len(self.calls) - 1, call.id, name))
        self._held = self._held[header.end() :]
        self._state, self._end = _State.ARGUMENTS, _JsonEnd()
        return True

    def _give_up(self, out: list[str | ToolDelta]) -> bool:
        out.append(self._tag + self._held)
        self._held, self._state, self._shown = "", _State.TEXT, True
        return False

    def _arguments(self, out: list[str | ToolDelta]) -> bool:
        assert self._end is not None
        if not self.calls[-1].arguments:
            self._held = self._held.lstrip()
        end = self._end.find(self._held)
        text = self._held if end is None else self._held[:end]
        self._held = "" if end is None else self._held[end:]
        if text:
            self.calls[-1].arguments += text
            out.append(ToolDelta(len(self.calls) - 1, arguments=text))
        if end is None:
            return False
        self._state = _State.CLOSING
        return True

    def _closing(self, out: list[str | ToolDelta]) -> bool:
        rest = self._held.lstrip().removeprefix("}").lstrip()
        if CLOSE.startswith(rest) and rest != CLOSE:
            return False
        self._held, self._state = rest.removeprefix(CLOSE), _State.TEXT
        return True


@dataclass(slots=True)
class _JsonEnd:
    """Finds where a JSON value ends, over several pieces of text."""

    depth: int = 0
    in_string: bool = False
    escaped: bool = False

    def find(self, text: str) -> int | None:
        """The index just after the value, or None when it goes on."""
        for index, char in enumerate(text):
            ends = False
            if self.escaped:
                self.escaped = False
            elif self.in_string:
                self.escaped = char == "\\"
                self.in_string = char != '"'
                ends = not self.in_string
            elif char == '"':
                self.in_string = True
            elif char in "{[":
                self.depth += 1
            elif char in "}]":
                self.depth -= 1
                ends = True
            if ends and self.depth <= 0:
                return index + 1
        return None


def _partial(text: str, tag: str) -> int:
    """How long a tail of `text` is the beginning of `tag`."""
    for length in range(min(len(tag) - 1, len(text)), 0, -1):
        if tag.startswith(text[-length:]):
            return length
    return 0
