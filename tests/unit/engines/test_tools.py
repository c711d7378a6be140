"""Tool calls found in streamed text, however it is split."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import InvalidRequest
from deployments.engines.chat.tools import ToolDelta, ToolParser, tool_plan

NAMES = frozenset({"add", "get_weather"})
CALL = '<tool_call>\n{"name": "add", "arguments": {"text": "} \\" {", "list": [1, {"a": 2}]}}\n</tool_call>'
TOOLS = [
    {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}},
    {"type": "function", "function": {"name": "get_weather"}},
]


def parse(pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
    """The shown text and the calls as a client would put them together from the deltas."""
    parser = ToolParser(NAMES)
    text, calls = "", []
    for piece in [item for part in pieces for item in parser.push(part)] + parser.finish():
        if isinstance(piece, ToolDelta):
            if piece.id is not None:
                calls.append([piece.name, ""])
            calls[piece.position][1] += piece.arguments
        else:
            text += piece
    assert [(call.name, call.arguments) for call in parser.calls] == [tuple(call) for call in calls]
    return text, [(str(name), arguments) for name, arguments in calls]


def split(text: str, cuts: list[int]) -> list[str]:
    edges = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]


cuts = st.lists(st.integers(0, 500), max_size=10)


@settings(deadline=None)
@given(cuts)
def test_a_call_is_found_however_it_is_split(cuts: list[int]) -> None:
    text, calls = parse(split(CALL, cuts))
    assert text == ""
    assert [name for name, _ in calls] == ["add"]
    assert json.loads(calls[0][1]) == {"text": '} " {', "list": [1, {"a": 2}]}


@settings(deadline=None)
@given(cuts)
def test_text_and_several_calls(cuts: list[int]) -> None:
    second = CALL.replace("add", "get_weather")
    text, calls = parse(split(f"Let me see.\n{CALL}\n{second}", cuts))
    assert text.strip() == "Let me see."
    assert [name for name, _ in calls] == ["add", "get_weather"]


@settings(deadline=None)
@given(cuts)
def test_a_bare_object_is_a_call_too(cuts: list[int]) -> None:
    text, calls = parse(split('{"name": "get_weather", "parameters": {"city": "Oslo"}}', cuts))
    assert (text, calls) == ("", [("get_weather", '{"city": "Oslo"}')])


@settings(deadline=None)
@given(st.sampled_from(["plain", "a < b <tool", '{"answer": 42}', '{"name": "other", "arguments": {}}', "1 {2}"]), cuts)
def test_what_is_no_call_stays_text(answer: str, cuts: list[int]) -> None:
    assert parse(split(answer, cuts)) == (answer, [])


def test_plain_text_is_not_held_back() -> None:
    assert ToolParser(NAMES).push("Hello <b>") == ["Hello <b>"]


def test_plans() -> None:
    assert tool_plan({}).mode == "none"
    assert tool_plan({"tools": TOOLS}).mode == "auto"
    assert tool_plan({"tools": TOOLS, "tool_choice": "none"}).mode == "none"
    named = tool_plan({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "add"}}})
    assert named.mode == "forced"
    assert [f["name"] for f in named.candidates] == ["add"]
    assert len(tool_plan({"tools": TOOLS, "tool_choice": "required"}).grammar_schema()["oneOf"]) == 2


@pytest.mark.parametrize(
    "body",
    [
        {"tool_choice": "required"},
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "missing"}}},
        {"tools": [{"type": "web_search"}]},
        {"tools": [{"type": "function", "function": {}}]},
        {"tools": {}, "tool_choice": "sometimes"},
    ],
)
def test_refusals(body: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest):
        tool_plan(body)
