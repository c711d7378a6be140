"""The Responses API without Ray: what reaches the engine, and the official events and objects that come of it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types.responses import Response, ResponseItem, ResponseStreamEvent
from pydantic import TypeAdapter

from cluster import errors
from tests.unit.scripted import LOADING, QUEUED, Scripted, chunk, events, said

OFFICIAL: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
TOOL = {"type": "function", "name": "weather", "parameters": {"type": "object"}, "strict": True}
METRICS = 13


async def post(gateway: Scripted, body: dict[str, Any], path: str = "/v1/responses") -> Any:
    async with gateway.http() as http:
        return await http.post(path, content=json.dumps({"model": "m", "input": "x", **body}))


async def stream(script: list[Any], **body: Any) -> list[dict[str, Any]]:
    """The events of a stream, each checked against its official type."""
    answer = await post(Scripted(script), {"stream": True, **body})
    assert answer.status_code == 200, answer.text
    return official(answer.text)


def official(text: str) -> list[dict[str, Any]]:
    parsed = events(text)
    for number, event in enumerate(parsed):
        assert event["sequence_number"] == number
        if event["type"] != "response.metrics":
            OFFICIAL.validate_python(event)
    return parsed


def types(parsed: list[dict[str, Any]]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in parsed]


async def sent(**body: Any) -> dict[str, Any]:
    """The chat body that reaches the engine."""
    gateway = Scripted([b'{"choices": []}'])
    answer = await post(gateway, body)
    assert answer.status_code == 200, answer.text
    return gateway.requests[0][1]


async def test_a_stream_of_text():
    parsed = await stream(said("Hel", "lo"))
    assert types(parsed) == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "metrics",
        "completed",
    ]
    created, last = parsed[0]["response"], parsed[-1]["response"]
    assert (created["model"], created["status"], created["output"]) == ("m", "in_progress", [])
    assert created["created_at"] > 1e9
    assert [event["delta"] for event in parsed if event["type"].endswith("text.delta")] == ["Hel", "lo"]
    assert (last["status"], last["output_text"], last["usage"]["output_tokens"]) == ("completed", "Hello", 2)
    assert parsed[-2]["metrics"] == last["metrics"]
    metrics = last["metrics"]
    assert len(metrics) == METRICS
    assert metrics["pool_total_wall_ms"] is not None
    assert metrics["engine_total_wall_ms"] == 9.0


async def test_the_helper_of_nodes_client_gets_the_events_that_it_knows():
    """It ends with an error at any other. The metrics are not lost: they stand in the response."""
    body = {"model": "m", "input": "x", "stream": True}
    async with Scripted(said("a")).http() as http:
        answer = await http.post("/v1/responses", json=body, headers={"x-stainless-helper-method": "stream"})
    parsed = official(answer.text)
    assert "metrics" not in types(parsed)
    assert len(parsed[-1]["response"]["metrics"]) == METRICS


async def test_calls_follow_the_text_each_as_an_item():
    def call(index: int, **function: str) -> bytes:
        head = {"id": f"call_{index}", "type": "function"} if "name" in function else {}
        return chunk({"tool_calls": [{"index": index, **head, "function": function}]})

    parsed = await stream(
        [
            chunk({"content": "Let me look."}),
            call(0, name="weather", arguments=""),
            call(0, arguments='{"city":'),
            call(0, arguments='"Bonn"}'),
            call(1, name="weather", arguments="{}"),
            *said(finish="tool_calls"),
        ],
        tools=[TOOL],
    )
    output = parsed[-1]["response"]["output"]
    assert [item["type"] for item in output] == ["message", "function_call", "function_call"]
    assert [item.get("arguments") for item in output] == [None, '{"city":"Bonn"}', "{}"]
    deltas = [event for event in parsed if event["type"] == "response.function_call_arguments.delta"]
    assert [(event["output_index"], event["delta"]) for event in deltas] == [(1, '{"city":'), (1, '"Bonn"}'), (2, "{}")]
    done = [event["item"]["status"] for event in parsed if event["type"] == "response.output_item.done"]
    assert done == ["completed"] * 3


@pytest.mark.parametrize(
    "script",
    [
        [chunk({"reasoning_content": "Hm"}), chunk({"reasoning_content": "m."}), *said("Yes")],
        said("<th", "ink>\nHmm", ".</", "think>\n\nYes"),
    ],
)
async def test_thoughts_that_are_marked_are_an_item_of_their_own(script: list[bytes]):
    parsed = await stream(script)
    thoughts, message = parsed[-1]["response"]["output"]
    assert (thoughts["type"], thoughts["content"][0]["text"]) == ("reasoning", "Hmm.")
    assert message["content"][0]["text"] == "Yes"
    assert parsed[-1]["response"]["output_text"] == "Yes"
    assert "reasoning_text.delta" in types(parsed)


async def test_an_answer_that_was_cut_short_is_incomplete():
    parsed = await stream(said("a", finish="length"))
    last = parsed[-1]
    assert (last["type"], last["response"]["incomplete_details"]) == (
        "response.incomplete",
        {"reason": "max_output_tokens"},
    )


async def test_a_response_that_waits_says_where():
    parsed = await stream([QUEUED, LOADING, *said("a")])
    assert types(parsed)[:4] == ["created", "queued", "in_progress", "output_item.added"]
    assert parsed[1]["response"]["status"] == "queued"
    assert types(await stream([LOADING, *said("a")]))[:3] == ["created", "in_progress", "output_item.added"]


async def test_a_stream_that_fails_ends_with_both_official_events():
    parsed = await stream([chunk({"content": "a"}), errors.BackendUnavailable("cut")])
    assert types(parsed)[-2:] == ["error", "failed"]
    assert parsed[-2]["code"] == "BACKEND_UNAVAILABLE"
    assert parsed[-1]["response"]["error"]["code"] == "server_error"
    assert parsed[-1]["response"]["output_text"] == "a"


async def test_logprobs_come_with_their_tokens():
    scores = {"content": [{"token": "a", "logprob": -0.5, "top_logprobs": [{"token": "a", "logprob": -0.5}]}]}
    choice = {"index": 0, "delta": {"content": "a"}, "logprobs": scores}
    parsed = await stream([chunk(choices=[choice]), *said()], include=["message.output_text.logprobs"])
    part = parsed[-1]["response"]["output"][0]["content"][0]
    assert part["logprobs"][0]["bytes"] == [97]
    body = await sent(include=["message.output_text.logprobs"], top_logprobs=2)
    assert (body["logprobs"], body["top_logprobs"]) == (True, 2)


async def test_a_whole_response_is_of_the_official_type():
    message = {
        "content": "Yes",
        "reasoning_content": "Hmm",
        "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}],
    }
    usage = {"prompt_tokens": 7, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 5}}
    script = {"choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}], "usage": usage}
    answer = (await post(Scripted([json.dumps(script).encode()]), {"tools": [TOOL], "metadata": {"a": "b"}})).json()
    response = Response.model_validate(answer)
    assert [item.type for item in response.output] == ["reasoning", "message", "function_call"]
    assert (response.output_text, answer["output_text"]) == ("Yes", "Yes")
    assert response.usage is not None
    assert (response.usage.input_tokens, response.usage.input_tokens_details.cached_tokens) == (7, 5)
    assert response.metadata == {"a": "b"}
    assert len(answer["metrics"]) == METRICS


async def test_items_become_messages():
    body = await sent(
        instructions="Be brief.",
        input=[
            {"role": "developer", "content": "Use tools."},
            {"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
            {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "Hm"}]},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Let me look."}]},
            {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"},
            {"type": "function_call", "call_id": "c2", "name": "weather", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c1", "output": "sun"},
            {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "rain"}]},
            {
                "role": "user",
                "content": [{"type": "input_text", "text": "This?"}, {"type": "input_image", "image_url": "data:x"}],
            },
        ],
    )
    calls = [
        {"id": name, "type": "function", "function": {"name": "weather", "arguments": "{}"}} for name in ("c1", "c2")
    ]
    assert body["messages"] == [
        {"role": "system", "content": "Be brief.\n\nUse tools."},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "Let me look.", "reasoning_content": "Hm", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c1", "content": "sun"},
        {"role": "tool", "tool_call_id": "c2", "content": "rain"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "This?"}, {"type": "image_url", "image_url": {"url": "data:x"}}],
        },
    ]


async def test_tools_formats_and_limits_are_the_chats():
    schema = {"type": "object", "properties": {}}
    body = await sent(
        tools=[TOOL],
        tool_choice={"type": "function", "name": "weather"},
        text={"format": {"type": "json_schema", "name": "n", "schema": schema, "strict": True}},
        max_output_tokens=5,
        temperature=0,
        priority="high",
        seed=7,
        reasoning={"effort": "low"},
    )
    assert body["tools"][0]["function"] == {"name": "weather", "parameters": {"type": "object"}, "strict": True}
    assert body["tool_choice"] == {"type": "function", "function": {"name": "weather"}}
    assert body["response_format"]["json_schema"] == {"name": "n", "schema": schema, "strict": True}
    assert (body["max_tokens"], body["temperature"], body["seed"]) == (5, 0, 7)
    assert body["chat_template_kwargs"] == {"reasoning_effort": "low", "enable_thinking": True}


async def test_what_only_a_hosted_service_has_is_left_out_and_said():
    gateway = Scripted([b'{"choices": []}'])
    answer = await post(
        gateway,
        {
            "tools": [{"type": "web_search"}, TOOL, {"type": "namespace", "name": "n"}],
            "tool_choice": {"type": "web_search"},
            "include": ["reasoning.encrypted_content"],
            "prompt_cache_key": "k",
            "client_metadata": {"x": 1},
            "service_tier": "flex",
            "truncation": "auto",
            "input": [{"type": "web_search_call", "id": "ws_1"}, {"role": "user", "content": "x"}],
        },
    )
    left_out = answer.headers["x-slotpool-ignored"].split(", ")
    assert left_out == ["input.web_search_call", "tools.web_search", "tools.namespace", "tool_choice"]
    body = gateway.requests[0][1]
    assert [tool["function"]["name"] for tool in body["tools"]] == ["weather"]
    assert "tool_choice" not in body
    assert [tool["type"] for tool in answer.json()["tools"]] == ["function"]


async def test_a_turn_of_codex_reaches_the_engine_whole():
    """As Codex sends it: nothing is stored, thoughts come back to it encrypted, and half of its tools are hosted."""
    gateway = Scripted(said("ok"))
    answer = await post(
        gateway,
        {
            "instructions": "You are Codex.",
            "input": [
                {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "<permissions>"}]},
                {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "List files."}]},
                {"type": "reasoning", "id": "rs_1", "summary": [], "content": None, "encrypted_content": "gAAA"},
                {"type": "function_call", "name": "shell", "arguments": '{"command":["ls"]}', "call_id": "call_1"},
                {"type": "function_call_output", "call_id": "call_1", "output": "a.txt"},
                {"type": "custom_tool_call", "status": "completed", "call_id": "call_2", "name": "x", "input": "y"},
            ],
            "tools": [
                {"type": "function", "name": "shell", "strict": False, "parameters": {"type": "object"}},
                {"type": "custom", "name": "apply_patch", "format": {"type": "grammar", "syntax": "lark"}},
                {"type": "web_search", "external_web_access": False},
            ],
            "tool_choice": "auto",
            "parallel_tool_calls": True,
            "reasoning": {"effort": "medium", "summary": "auto"},
            "store": False,
            "stream": True,
            "include": ["reasoning.encrypted_content"],
            "prompt_cache_key": "0199",
            "text": {"verbosity": "low"},
            "client_metadata": {"x-codex-installation-id": "1"},
        },
    )
    assert answer.status_code == 200, answer.text
    assert official(answer.text)[-1]["type"] == "response.completed"
    messages = gateway.requests[0][1]["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "tool"]
    assert messages[0]["content"] == "You are Codex.\n\n<permissions>"
    assert messages[2]["tool_calls"][0]["function"] == {"name": "shell", "arguments": '{"command":["ls"]}'}
    ignored = answer.headers["x-slotpool-ignored"].split(", ")
    assert ignored == ["input.custom_tool_call", "tools.custom", "tools.web_search", "text.verbosity"]


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"input": None}, 400, "input"),
        ({"input": []}, 400, "input"),
        ({"input": 7}, 400, "input"),
        ({"input": [{"role": "king", "content": "x"}]}, 400, "input.0.role"),
        ({"input": [{"role": "user", "content": [{"type": "poem"}]}]}, 400, "input.0.content.0.type"),
        ({"input": [{"type": "function_call", "call_id": "c"}]}, 400, "input.0.name"),
        ({"input": [{}]}, 400, "input.0"),
        ({"input": [{"type": "item_reference", "id": "msg_x"}]}, 404, "input.0"),
        ({"conversation": "conv_1"}, 400, "conversation"),
        ({"text": {"format": {"type": "poem"}}}, 400, "text.format"),
        ({"text": {"format": {"type": "json_schema"}}}, 400, "text.format.schema"),
        ({"tools": [{"type": "function"}]}, 400, "tools.0.name"),
        ({"tool_choice": {"type": "function", "name": "f"}}, 400, "tool_choice"),
        ({"temperature": 3}, 400, "temperature"),
        ({"max_output_tokens": 0}, 400, "max_output_tokens"),
        ({"previous_response_id": "resp_none"}, 400, "previous_response_id"),
        ({"previous_response_id": "\ud800"}, 400, "previous_response_id"),
        ({"input": [{"id": "\x00"}]}, 404, "input.0"),
        ({"input": [{"type": ["x"]}]}, 400, "input.0"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "tools": [{"name": []}], "mode": 7}},
            400,
            "tool_choice",
        ),
        ({"background": True, "store": False}, 400, "background"),
        ({"decoding": {"beam_size": 17}}, 422, "decoding.beam_size"),
        ({"decoding": {"top_k": 0}}, 422, "decoding.top_k"),
        ({"source_lang_code": "d"}, 422, "source_lang_code"),
        ({"model": "none", "input": 7}, 404, "model"),
        ({"priority": "king"}, 400, "priority"),
    ],
)
async def test_a_bad_body_is_refused_with_the_field_at_fault(body: dict[str, Any], status: int, param: str):
    answer = await post(Scripted(), body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.text


async def test_an_engines_refusal_names_the_field_as_it_is_called_here():
    refused = errors.ContextLengthExceeded("too long", param="messages")
    answer = await post(Scripted([refused]), {})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input")


async def test_a_refusal_for_load_is_a_503():
    answer = await post(Scripted([errors.QueueFull("full", retry_after=3.0)]), {"stream": True})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "3")


async def test_a_stored_response_is_found_continued_referred_to_and_deleted():
    gateway = Scripted(said("One"), *[[b'{"choices": [{"message": {"content": "Two"}}]}']] * 2)
    async with gateway.http() as http:
        first = official((await http.post("/v1/responses", json={"model": "m", "input": "1", "stream": True})).text)
        first_id = first[-1]["response"]["id"]
        assert (await http.get(f"/v1/responses/{first_id}")).json() == first[-1]["response"]
        second = await http.post(
            "/v1/responses",
            json={"model": "m", "input": "2", "previous_response_id": first_id, "instructions": "Count."},
        )
        said_before = [("system", "Count."), ("user", "1"), ("assistant", "One"), ("user", "2")]
        assert [(each["role"], each["content"]) for each in gateway.requests[1][1]["messages"]] == said_before
        items = (await http.get(f"/v1/responses/{second.json()['id']}/input_items")).json()
        assert [item["content"][0]["text"] for item in items["data"]] == ["2"]
        TypeAdapter(list[ResponseItem]).validate_python(items["data"])
        reference = {"type": "item_reference", "id": first[-1]["response"]["output"][0]["id"]}
        await http.post("/v1/responses", json={"model": "m", "input": [reference, {"role": "user", "content": "3"}]})
        assert [each["content"] for each in gateway.requests[2][1]["messages"]] == ["One", "3"]
        assert (await http.post(f"/v1/responses/{first_id}/cancel")).status_code == 400
        assert (await http.delete(f"/v1/responses/{first_id}")).json()["deleted"] is True
        for answer in (await http.get(f"/v1/responses/{first_id}"), await http.delete(f"/v1/responses/{first_id}")):
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "response_not_found")


async def test_a_response_that_is_not_to_be_stored_is_not():
    gateway = Scripted([b'{"choices": []}'])
    async with gateway.http() as http:
        answer = (await http.post("/v1/responses", json={"model": "m", "input": "x", "store": False})).json()
        assert answer["store"] is False
        assert (await http.get(f"/v1/responses/{answer['id']}")).status_code == 404


async def test_the_tokens_of_a_prompt_are_counted_by_the_engine():
    gateway = Scripted([b'{"count": 42, "tokens": []}'])
    answer = await post(gateway, {"tools": [TOOL], "max_output_tokens": 9}, "/v1/responses/input_tokens")
    assert answer.json() == {"object": "response.input_tokens", "input_tokens": 42}
    (request, body) = gateway.requests[0]
    assert (request.path, set(body)) == ("/tokenize", {"model", "messages", "tools"})
    server = Scripted([b'{"usage": {"prompt_tokens": 7}}'], args={"servers": [{"url": "http://127.0.0.1:9"}]})
    answer = await post(server, {}, "/v1/responses/input_tokens")
    assert answer.json()["input_tokens"] == 7
    assert (server.requests[0][0].path, server.requests[0][1]["max_tokens"]) == ("/v1/chat/completions", 1)
