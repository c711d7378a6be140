"""Anthropic's Messages as an adapter: what a body means as a chat, and every event as Anthropic's own types have it."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
from anthropic import types
from anthropic.types.shared import ErrorResponse

from app.wire.messages.adapter import UNSIGNED, MessagesAdapter
from app.wire.messages.chat import checked, prompt_of
from app.wire.messages.schema import Prompt
from cluster import errors
from cluster.errors import PoolError
from deployments.run_info import RunInfo
from deployments.schemas import TOKENIZE
from tests.anthropic_events import checked as checked_events
from tests.unit.scripted import LOADING, QUEUED, Scripted, chunk, events, said

ASKED = {"model": "m", "max_tokens": 64, "messages": [{"role": "user", "content": "Hi"}]}
TOOL = {"name": "add", "description": "Adds.", "input_schema": {"type": "object", "properties": {"x": {}}}}
CALL = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "add", "arguments": ""}}


def chat(**fields: Any) -> dict[str, Any]:
    return MessagesAdapter({**ASKED, **fields}, "r").chat


def messages(*turns: dict[str, Any], **fields: Any) -> list[dict[str, Any]]:
    return chat(messages=list(turns), **fields)["messages"]


async def stream(*script: bytes | PoolError, **fields: Any) -> list[dict[str, Any]]:
    """The parsed events, each checked against Anthropic's own types."""
    async with Scripted(list(script)).http() as http:
        answer = await http.post("/v1/messages", json={**ASKED, "stream": True, **fields})
    assert answer.status_code == 200, answer.text
    return checked_events(answer.text)


def shape(seen: list[dict[str, Any]]) -> list[str]:
    return [event["type"] for event in seen]


async def test_a_text_stream():
    seen = await stream(*said("Hel", "lo"))
    assert shape(seen) == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert seen[0]["message"]["model"] == "m"
    assert "".join(event["delta"]["text"] for event in seen[2:4]) == "Hello"
    assert (seen[-2]["delta"]["stop_reason"], seen[-2]["delta"]["stop_sequence"]) == ("end_turn", None)
    assert (seen[-2]["usage"]["input_tokens"], seen[-2]["usage"]["output_tokens"]) == (3, 2)


async def test_thinking_text_and_calls_are_blocks_one_after_the_other():
    more = {"index": 0, "function": {"arguments": '{"x": 1}'}}
    other = {"index": 1, "id": "call_2", "function": {"name": "add", "arguments": "{}"}}
    script = [
        chunk({"role": "assistant", "content": ""}),
        chunk({"reasoning_content": "hm"}),
        chunk({"content": "I add."}),
        *(chunk({"tool_calls": [call]}) for call in (CALL, more, other)),
        chunk(finish="tool_calls"),
        chunk(usage={"prompt_tokens": 9, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 7}}),
    ]
    seen = await stream(*script, tools=[TOOL])
    starts = [event["content_block"] for event in seen if event["type"] == "content_block_start"]
    assert [block["type"] for block in starts] == ["thinking", "text", "tool_use", "tool_use"]
    assert (starts[2]["id"], starts[2]["name"], starts[2]["input"]) == ("call_1", "add", {})
    deltas = [(event["index"], event["delta"]) for event in seen if event["type"] == "content_block_delta"]
    assert deltas[1] == (0, {"type": "signature_delta", "signature": UNSIGNED}), "clients drop thoughts without one"
    assert deltas[3:] == [
        (2, {"type": "input_json_delta", "partial_json": '{"x": 1}'}),
        (3, {"type": "input_json_delta", "partial_json": "{}"}),
    ]
    assert [event["index"] for event in seen if event["type"] == "content_block_stop"] == [0, 1, 2, 3]
    assert seen[-2]["delta"]["stop_reason"] == "tool_use"
    assert seen[-2]["usage"] == {
        "input_tokens": 2,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 7,
        "output_tokens": 4,
        "output_tokens_details": None,
        "server_tool_use": None,
    }


async def test_whoever_may_call_once_calls_once():
    other = {**CALL, "index": 1, "id": "call_2"}
    one = {"tools": [TOOL], "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}
    seen = await stream(chunk({"tool_calls": [CALL]}), chunk({"tool_calls": [other]}), chunk(finish="stop"), **one)
    assert shape(seen).count("content_block_start") == 1
    assert seen[-2]["delta"]["stop_reason"] == "tool_use"


@pytest.mark.parametrize(
    ("choice", "reason", "stop"),
    [
        ({"finish_reason": "stop", "stop_reason": "END"}, "stop_sequence", "END"),
        ({"finish_reason": "stop", "stop_reason": 2}, "end_turn", None),
        ({"finish_reason": "length"}, "max_tokens", None),
        ({"finish_reason": "content_filter"}, "refusal", None),
    ],
)
async def test_why_it_stopped(choice: dict[str, Any], reason: str, stop: str | None):
    last = b"data: " + json.dumps({"choices": [{"index": 0, "delta": {}, **choice}]}).encode() + b"\n\n"
    usage = chunk(usage={"prompt_tokens": 3, "completion_tokens": 64})
    delta = (await stream(chunk({"content": "x"}), last, usage))[-2]["delta"]
    assert (delta["stop_reason"], delta["stop_sequence"]) == (reason, stop)


async def test_an_answer_that_the_context_ends_says_so():
    seen = await stream(*said("a", "b", finish="length"))
    assert seen[-2]["delta"]["stop_reason"] == "model_context_window_exceeded"


async def test_a_waiting_stream_begins_with_its_message_and_pings():
    seen = await stream(QUEUED, LOADING, *said("a"))
    assert shape(seen)[:3] == ["message_start", "ping", "content_block_start"]
    assert shape(seen).count("message_start") == 1


async def test_an_error_in_the_stream_is_an_event():
    seen = await stream(QUEUED, errors.BackendUnavailable("gone"))
    assert seen[-1]["error"]["type"] == "overloaded_error"
    assert seen[-1]["request_id"]


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (errors.QueueFull("full", retry_after=90), 503, "overloaded_error"),
        (errors.RateLimited("slowly", retry_after=2), 429, "rate_limit_error"),
        (errors.BackendTimeout("late", phase="queued"), 504, "timeout_error"),
        (errors.UnsupportedParameter("no", param="tools"), 400, "invalid_request_error"),
        (errors.ContextLengthExceeded("5 > 4"), 400, "invalid_request_error"),
        (PoolError("x"), 500, "api_error"),
    ],
)
async def test_errors_have_anthropics_shape(error: PoolError, status: int, kind: str):
    async with Scripted([error]).http() as http:
        answer = await http.post("/v1/messages", json=ASKED, headers={"X-Request-Id": "mine"})
    body = ErrorResponse.model_validate(answer.json())
    assert (answer.status_code, answer.json()["error"]["type"]) == (status, kind)
    assert body.request_id == answer.headers["request-id"] == "mine"
    assert ("retry-after" in answer.headers) == (status in (429, 503))
    if isinstance(error, errors.ContextLengthExceeded):
        assert answer.json()["error"]["message"] == "prompt is too long: 5 > 4"


async def test_the_model_is_looked_at_before_the_schema():
    async with Scripted().http() as http:
        for body, status, code in (
            ({"model": "nope"}, 404, "MODEL_NOT_FOUND"),
            ({"max_tokens": "x"}, 400, "MODEL_REQUIRED"),
            ({"model": "m", "messages": ASKED["messages"]}, 400, "INVALID_REQUEST"),
        ):
            answer = await http.post("/v1/messages", json=body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
        assert answer.json()["error"]["param"] == "max_tokens"


async def test_a_whole_message():
    message = {
        "role": "assistant",
        "content": "x",
        "reasoning_content": "hm",
        "tool_calls": [
            {"id": "a", "function": {"name": "add", "arguments": '{"x": 1}'}},
            {"id": "b", "function": {"name": "add", "arguments": '{"x": '}},
        ],
    }
    usage = {"prompt_tokens": 9, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 7}}
    body = {"choices": [{"message": message, "finish_reason": "tool_calls"}], "usage": usage}
    async with Scripted([json.dumps(body).encode()]).http() as http:
        answer = await http.post("/v1/messages?beta=true", json=ASKED, headers={"anthropic-beta": "x"})
    whole = types.Message.model_validate(answer.json(), strict=True)
    assert [block.type for block in whole.content] == ["thinking", "text", "tool_use", "tool_use"]
    assert [block.input for block in whole.content[2:]] == [{"x": 1}, {"INVALID_JSON": '{"x": '}]
    assert whole.stop_reason == "tool_use"
    assert (whole.usage.input_tokens, whole.usage.cache_read_input_tokens) == (2, 7)
    # The API's own schema has these everywhere, with null where there is nothing to say.
    assert whole.model_fields_set >= {"container", "stop_details"}
    assert whole.usage.model_fields_set >= {"cache_creation", "inference_geo", "server_tool_use", "service_tier"}
    assert whole.content[1].citations == [], "the schema requires it, and the AI SDK refuses null"
    assert answer.headers["request-id"]


async def test_head_is_answered_for_whoever_asks_whether_there_is_a_server():
    async with Scripted(args={"models": {"m": {"backend": "fake"}}, "api_keys": ["sha256:" + "0" * 64]}).http() as http:
        assert (await http.head("/")).status_code == 200
        refused = await http.post("/v1/messages", json=ASKED)
        assert (refused.status_code, refused.json()["error"]["type"]) == (401, "authentication_error")


async def test_a_foreign_page_may_not_ask():
    async with Scripted().http() as http:
        for path in ("/v1/messages", "/api/chat", "/models/unload"):
            answer = await http.post(path, json=ASKED, headers={"Origin": "http://evil.example"})
            assert answer.status_code == 403
            assert "page" in answer.text


async def test_load_and_unload_need_an_operators_key():
    keys = {name: ["sha256:" + hashlib.sha256(name.encode()).hexdigest()] for name in ("api_keys", "admin_keys")}
    async with Scripted(args={"models": {"m": {"backend": "fake"}}, **keys}).http() as http:
        for key, status in (("api_keys", 403), ("x", 401)):
            answer = await http.post("/models/unload", json={"model": "m"}, headers={"x-api-key": key})
            assert answer.status_code == status


async def test_the_document_has_the_bodies_and_the_errors_of_each_family():
    async with Scripted().http() as http:
        paths = (await http.get("/openapi.json")).json()["paths"]
    for path, shape in (("/v1/messages", "MessagesError"), ("/api/chat", "OllamaError"), ("/models/load", "Error")):
        entry = paths[path]["post"]
        assert entry["responses"]["4XX"]["content"]["application/json"]["schema"]["$ref"].endswith(f"/{shape}")
    assert paths["/api/generate"]["post"]["requestBody"]["content"]["application/json"]["schema"]


async def test_tokens_are_counted_by_the_engine():
    gateway = Scripted([b'{"tokens": [1, 2], "count": 12}'])
    async with gateway.http() as http:
        answer = await http.post("/v1/messages/count_tokens", json={**ASKED, "system": "S", "tools": [TOOL]})
    assert types.MessageTokensCount.model_validate(answer.json(), strict=True).input_tokens == 12
    async with Scripted([b'{"tokens": []}']).http() as http:
        uncounted = await http.post("/v1/messages/count_tokens", json=ASKED)
    assert (uncounted.status_code, uncounted.json()["error"]["type"]) == (501, "api_error")
    ((request, body),) = gateway.requests
    assert request.path == TOKENIZE
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert body["tools"][0]["function"]["name"] == "add"


# --- from a body to a chat


def test_the_fields_that_have_another_name_in_a_chat():
    body = chat(
        system="S",
        stop_sequences=["END"],
        temperature=0.5,
        top_k=3,
        top_p=0.9,
        priority="high",
        tools=[TOOL],
        tool_choice={"type": "any"},
        stream=True,
        metadata={"user_id": "u"},
        context_management={"edits": []},
        service_tier="auto",
    )
    assert body == {
        "model": "m",
        "messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}],
        "max_tokens": 64,
        "clamp_max_tokens": True,
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.9,
        "stop": ["END"],
        "priority": "high",
        "tools": [
            {
                "type": "function",
                "function": {"name": "add", "description": "Adds.", "parameters": TOOL["input_schema"]},
            }
        ],
        "tool_choice": "required",
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_thinking_and_effort_are_for_templates_that_ask():
    assert "chat_template_kwargs" not in chat(thinking={"type": "adaptive"})
    assert chat(thinking={"type": "disabled"})["chat_template_kwargs"] == {"enable_thinking": False}
    asked = {"thinking": {"type": "enabled", "budget_tokens": 2048}, "output_config": {"effort": "max"}}
    adapter = MessagesAdapter({**ASKED, **asked}, "r")
    assert adapter.chat["chat_template_kwargs"] == {"enable_thinking": True, "reasoning_effort": "high"}
    assert adapter.ignored == ["thinking.budget_tokens"]


def test_structured_output():
    form = {"type": "json_schema", "schema": {"type": "object"}}
    wanted = {"type": "json_schema", "json_schema": {"name": "output", "schema": {"type": "object"}}}
    assert chat(output_config={"format": form})["response_format"] == wanted
    assert chat(output_format=form)["response_format"] == wanted
    with pytest.raises(errors.UnsupportedParameter):
        chat(output_config={"format": {"type": "xml"}})


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"type": "auto"}, "auto"),
        ({"type": "none"}, "none"),
        ({"type": "tool", "name": "add"}, {"type": "function", "function": {"name": "add"}}),
    ],
)
def test_tool_choice(choice: dict[str, Any], expected: Any):
    assert chat(tools=[TOOL], tool_choice=choice)["tool_choice"] == expected


def test_hosted_tools_are_left_out_and_named():
    search = {"type": "web_search_20250305", "name": "web_search"}
    body = {**ASKED, "tools": [search, TOOL], "tool_choice": {"type": "auto"}}
    adapter = MessagesAdapter(body, "r")
    assert [tool["function"]["name"] for tool in adapter.chat["tools"]] == ["add"]
    assert adapter.ignored == ["tools.web_search_20250305"]
    alone = chat(tools=[search], tool_choice={"type": "auto"})
    assert "tools" not in alone
    assert "tool_choice" not in alone


def test_the_billing_header_is_dropped_and_nothing_else():
    blocks = [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1; cch=ab12;"},
        {"type": "text", "text": "You are Claude Code.", "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": "Be brief."},
    ]
    assert messages(ASKED["messages"][0], system=blocks)[0]["content"] == "You are Claude Code.\n\nBe brief."


def test_a_conversation_with_tools():
    calls = [{"type": "tool_use", "id": "t1", "name": "add", "input": {"x": "é"}}]
    results = [
        {"type": "tool_result", "tool_use_id": "t1", "content": "3"},
        {"type": "tool_result", "tool_use_id": "t2", "is_error": True, "content": [{"type": "text", "text": "no"}]},
        {"type": "text", "text": "Go on."},
    ]
    thought = {"type": "thinking", "thinking": "hm", "signature": "s"}
    assert messages(
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": [thought, {"type": "text", "text": "I add."}, *calls]},
        {"role": "user", "content": results},
        {"role": "system", "content": "Later."},
    ) == [
        {"role": "user", "content": "a\nb"},
        {
            "role": "assistant",
            "content": "I add.",
            "reasoning_content": "hm",
            "tool_calls": [{"id": "t1", "type": "function", "function": {"name": "add", "arguments": '{"x": "é"}'}}],
        },
        {"role": "tool", "tool_call_id": "t1", "content": "3"},
        {"role": "tool", "tool_call_id": "t2", "content": "Error: no"},
        {"role": "user", "content": "Go on."},
        {"role": "system", "content": "Later."},
    ]


def test_images_and_documents():
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA=="}}
    text = {"type": "document", "title": "T", "source": {"type": "text", "media_type": "text/plain", "data": "D"}}
    (message,) = messages({"role": "user", "content": [image, text]})
    assert message["content"] == [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}},
        {"type": "text", "text": "T"},
        {"type": "text", "text": "D"},
    ]
    shown = [{"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "see"}, image]}]
    tool, user = messages({"role": "user", "content": shown})
    assert tool["content"] == "see"
    assert user["content"][0]["type"] == "image_url"


@pytest.mark.parametrize(
    ("content", "param"),
    [
        ([{"type": "poem"}], "messages.0.content.0"),
        ([{"type": "text", "text": "x"}, {"text": "y"}], "messages.0.content.1"),
        ([{"type": "text"}], "messages.0.content.0.text"),
        ([{"type": "image", "source": {"type": "file", "file_id": "f"}}], "messages.0.content.0"),
        ([{"type": "document", "source": {"type": "base64", "data": ""}}], "messages.0.content.0"),
        ([{"type": "tool_result"}], "messages.0.content.0.tool_use_id"),
        ([{"type": "tool_result", "tool_use_id": "t", "content": [7]}], "messages.0.content.0.content.0"),
        ([7], "messages.0.content"),
        (7, "messages.0.content"),
    ],
)
def test_what_cannot_be_said_is_refused_by_its_path(content: Any, param: str):
    with pytest.raises(errors.InvalidRequest) as refused:
        messages({"role": "user", "content": content})
    assert (refused.value.status, refused.value.param) == (400, param)


def test_a_last_word_of_the_assistant_is_continued():
    prefill = [ASKED["messages"][0], {"role": "assistant", "content": "{"}]
    body, _ = prompt_of(checked(Prompt, {"model": "m", "messages": prefill}), {})
    assert body["continue_final_message"] is True
    assert "continue_final_message" not in chat()


def test_a_report_stands_for_the_usage_that_a_stream_does_not_tell():
    adapter = MessagesAdapter(ASKED, "r")
    info = RunInfo()
    info.report.prompt_tokens, info.report.output_tokens = 5, 2
    adapter.feed({"choices": [{"delta": {"content": "x"}, "finish_reason": "stop"}]})
    (delta,) = (event for event in events(adapter.end(info).decode()) if event["type"] == "message_delta")
    assert (delta["usage"]["input_tokens"], delta["usage"]["output_tokens"]) == (5, 2)
