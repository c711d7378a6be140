"""Every body and chunk is what the official SDK's own types accept; options are checked before anything runs."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from cluster.errors import UnsupportedParameter
from deployments.engines.chat.logprobs import TokenLogprob
from deployments.engines.chat.metrics import metrics_object
from deployments.engines.chat.request import ResponseFormat, chat_options, completion_options
from deployments.engines.chat.tools import ToolCall, ToolDelta
from deployments.engines.chat.wire import ChatWriter, Choice, CompletionWriter, usage_object
from deployments.engines.protocol import Call, Report

SCORES = [TokenLogprob(b"He", -0.5, ((b"He", -0.5), (b"\xf0\x9f", -1.5))), TokenLogprob("é\n".encode(), -2.0)]
USAGE = usage_object(3, 2, 1)
NASTY = 'quote " backslash \\ newline \n tab \t é 👋 \u2028 </script>'


def events(raw: bytes) -> list[dict[str, Any]]:
    parts = raw.decode().split("\n\n")
    assert parts.pop() == ""
    assert all(part.startswith("data: ") and "\n" not in part for part in parts)
    return [json.loads(part[6:]) for part in parts]


def test_chat_stream() -> None:
    writer = ChatWriter("r1", 'mo"del', with_usage=True)
    raw = writer.delta(0, NASTY, SCORES) + writer.delta(0, "x", None) + writer.finish(0, "stop", {})
    chunks = events(raw + writer.usage(USAGE, {"metrics": {"engine_output_tokens": 2}}))
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk, strict=True)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunks[1]["choices"][0]["delta"]["content"] == NASTY
    assert chunks[1]["choices"][0]["logprobs"]["content"][0]["top_logprobs"][1]["bytes"] == [0xF0, 0x9F]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None, None, None, "stop"]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == USAGE
    assert chunks[-1]["metrics"]
    assert {chunk["id"] for chunk in chunks} == {"chatcmpl-r1"}
    assert chunks[0]["model"] == 'mo"del'


def test_chat_stream_without_usage_has_no_usage_member() -> None:
    writer = ChatWriter("r1", "m")
    chunks = events(writer.delta(0, "x", None) + writer.finish(0, "length", {"metrics": {"a": None}}))
    assert all("usage" not in chunk for chunk in chunks)
    assert chunks[-1]["metrics"] == {"a": None}


def test_every_choice_of_a_stream_opens_with_its_role_once() -> None:
    writer = ChatWriter("r1", "m")
    chunks = events(writer.delta(1, "x", None) + writer.delta(0, "y", None) + writer.finish(1, "stop", {}))
    opened = [c["choices"][0]["index"] for c in chunks if "role" in c["choices"][0]["delta"]]
    assert opened == [1, 0]


def test_tool_deltas() -> None:
    writer = ChatWriter("r1", "m")
    raw = writer.tool_delta(0, ToolDelta(0, "call_1", "add")) + writer.tool_delta(0, ToolDelta(0, arguments='{"a":1}'))
    chunks = [ChatCompletionChunk.model_validate(chunk) for chunk in events(raw)]
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert (calls[0].id, calls[0].type, calls[0].function.name) == ("call_1", "function", "add")  # type: ignore[union-attr]
    assert "".join(call.function.arguments or "" for call in calls if call.function) == '{"a":1}'


def test_chat_body() -> None:
    writer = ChatWriter("r1", "m", with_logprobs=True)
    choices = [
        Choice(text=NASTY, logprobs=SCORES),
        Choice(calls=[ToolCall("call_1", "add", "{}")], finish="tool_calls"),
    ]
    body = ChatCompletion.model_validate_json(writer.body(choices, USAGE, {"metrics": {}}))
    assert body.choices[0].message.content == NASTY
    assert body.choices[0].message.tool_calls is None
    assert body.choices[1].message.content is None
    assert body.choices[1].message.tool_calls
    assert body.choices[1].finish_reason == "tool_calls"
    assert body.usage
    assert body.usage.total_tokens == 5


def test_completion_stream_and_body() -> None:
    writer = CompletionWriter("r1", "m", with_logprobs=True)
    raw = writer.delta(0, "Heé\n", SCORES) + writer.delta(0, "x", SCORES[:1]) + writer.finish(0, "stop", {})
    chunks = events(raw)
    for chunk in chunks:
        Completion.model_validate({**chunk, "choices": [{**chunk["choices"][0], "finish_reason": "stop"}]})
    assert chunks[0]["choices"][0]["logprobs"]["text_offset"] == [0, 2]
    assert chunks[1]["choices"][0]["logprobs"]["text_offset"] == [4]
    body = Completion.model_validate_json(writer.body([Choice("Heé\n", logprobs=SCORES)], USAGE, {}))
    assert body.object == "text_completion"
    assert body.choices[0].text == "Heé\n"


def test_the_stop_string_that_ended_an_answer_is_named() -> None:
    for writer in (ChatWriter("r1", "m"), CompletionWriter("r1", "m")):
        (*_, last) = events(writer.finish(0, "stop", {"metrics": {}}, 'END"'))
        assert (last["choices"][0]["finish_reason"], last["choices"][0]["stop_reason"]) == ("stop", 'END"')
        body = json.loads(writer.body([Choice("x", stop="END")], USAGE, {}))
        assert body["choices"][0]["stop_reason"] == "END"


def test_metrics_nest_and_say_null_for_the_unknown() -> None:
    call = Call("/v1/chat/completions", {}, "r", queue_wait_ms=5, load_wait_ms=7, pool_elapsed_ms=20)
    times = {"ttft_ms": 300.0, "total_ms": 1000.0, "tokenize_ms": 10.0, "queue_ms": 90.0, "backend_ms": 800.0}
    report = Report(prompt_tokens=10, cached_tokens=0, output_tokens=40, **times)
    known = metrics_object(call, report)
    assert known["pool_total_wall_ms"] >= known["engine_total_wall_ms"] >= known["backend_inference_wall_ms"]
    assert known["engine_tokens_per_second"] == 50.0
    assert known["gpu_time_to_first_token_ms"] == 200.0
    assert known["gpu_decode_after_first_token_ms"] == 600.0
    unknown = metrics_object(call, Report(total_ms=1000.0))
    assert unknown["backend_inference_wall_ms"] is None
    assert unknown["pool_total_wall_ms"] == 1020.0
    assert set(unknown) == set(known)


def test_options() -> None:
    options = chat_options({"max_tokens": 5, "max_completion_tokens": 9, "stop": "x", "logit_bias": {"7": -100}})
    assert (options.max_tokens, options.stops, options.sampling.logit_bias) == (9, ("x",), ((7, -100.0),))
    assert chat_options({"logprobs": True}).top_logprobs == 0
    assert chat_options({}).top_logprobs is None
    assert completion_options({}).max_tokens == 16
    assert completion_options({"max_tokens": 0}).max_tokens == 0
    assert [chat_options({"top_k": top_k}).sampling.top_k for top_k in (-1, 0, None, 40)] == [0, 0, 0, 40]
    assert chat_options({"repetition_penalty": 1.5}).sampling.repeat_penalty == 1.5
    schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}
    assert chat_options({"response_format": schema}).response_format == ResponseFormat(
        "json_schema", {"type": "object"}
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("audio", {"voice": "x"}),
        ("modalities", ["audio"]),
        ("prediction", {"type": "content"}),
        ("functions", [{"name": "f"}]),
        ("response_format", {"type": "yaml"}),
    ],
)
def test_what_would_change_the_answer_but_cannot_be_done_is_refused(field: str, value: object) -> None:
    with pytest.raises(UnsupportedParameter) as refused:
        chat_options({field: value})
    assert refused.value.param == field


@pytest.mark.parametrize(("field", "value"), [("suffix", "end"), ("best_of", 3)])
def test_completions_refuse_suffix_and_best_of(field: str, value: object) -> None:
    with pytest.raises(UnsupportedParameter) as refused:
        completion_options({field: value})
    assert refused.value.param == field
