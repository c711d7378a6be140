"""Between the pool's routes and vLLM's: bodies, events, counts and errors. No vLLM is needed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cluster.errors import (
    BackendUnavailable,
    ContextLengthExceeded,
    InvalidRequest,
    PoolError,
    RateLimited,
    UnsupportedParameter,
)
from deployments.engines.protocol import Call, Report
from deployments.engines.vllm.wire import Answer, refusal, request_body
from deployments.schemas import CHAT, COMPLETIONS, DETOKENIZE, TOKENIZE

HELLO = [{"role": "user", "content": "hello"}]


def sent(path: str, **fields: Any) -> dict[str, Any]:
    """What vLLM gets."""
    body: dict[str, Any] = json.loads(request_body(Call(path, {"model": "alias", **fields}, "r"), 1024))
    return body


def test_a_chat_in_the_pools_words_is_one_in_vllms():
    body = sent(
        CHAT,
        messages=[{"role": "developer", "content": "be brief"}, *HELLO],
        tools=[],
        tool_choice="auto",
        enable_thinking=False,
        reasoning={"effort": "low"},
        repeat_penalty=1.1,
        top_k=-1,
        seed=None,
    )
    assert body == {
        "messages": [{"role": "system", "content": "be brief"}, *HELLO],
        "chat_template_kwargs": {"enable_thinking": False},
        "reasoning_effort": "low",
        "repetition_penalty": 1.1,
        "top_k": 0,
    }


def test_a_call_that_is_forced_keeps_to_its_schema():
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    strict = {"type": "function", "function": {**tool["function"], "strict": True}}
    assert sent(CHAT, messages=HELLO, tools=[tool], tool_choice="required")["tools"] == [strict]
    assert sent(CHAT, messages=HELLO, tools=[tool])["tools"] == [tool]


def test_a_stream_always_has_its_usage_told():
    assert sent(CHAT, messages=HELLO, stream=True)["stream_options"] == {"include_usage": True}
    assert "stream_options" not in sent(CHAT, messages=HELLO, stream_options={"include_usage": True})


def test_a_bound_on_tokens_that_does_not_fit_is_brought_down_where_that_is_asked_for():
    assert sent(CHAT, messages=HELLO, max_tokens=9000, clamp_max_tokens=True)["max_tokens"] == 1024
    assert sent(CHAT, messages=HELLO, max_tokens=9000)["max_tokens"] == 9000
    assert sent(COMPLETIONS, prompt="x", clamp_max_tokens=True)["max_tokens"] == 1024
    assert "max_tokens" not in sent(COMPLETIONS, prompt="x")


def test_a_model_that_does_not_reason_refuses_to_be_told_how_much():
    call = Call(CHAT, {"messages": HELLO, "reasoning": {"effort": "high"}}, "r")
    assert b'"reasoning_effort": "high"' in request_body(call, 1024)
    with pytest.raises(UnsupportedParameter) as refused:
        request_body(call, 1024, reasons=False)
    assert refused.value.param == "reasoning_effort"


def test_a_form_that_cannot_be_held_to_is_named():
    body = b'{"error": {"message": "The provided JSON schema is not valid", "param": null, "code": 400}}'
    assert refusal(400, body, {"response_format": {"type": "json_schema"}}).param == "response_format"
    assert refusal(400, body, {}).param is None


def test_a_grammar_constrains():
    assert sent(CHAT, messages=HELLO, grammar='root ::= "a"')["structured_outputs"] == {"grammar": 'root ::= "a"'}


@pytest.mark.parametrize(("field", "value"), [("best_of", 3), ("modalities", ["audio"]), ("functions", [{}])])
def test_what_vllm_would_not_read_is_refused(field: str, value: Any):
    with pytest.raises(UnsupportedParameter) as refused:
        sent(COMPLETIONS, prompt="x", **{field: value})
    assert refused.value.param == field


def test_tokens_in_llama_servers_words():
    assert sent(TOKENIZE, content="a b", with_pieces=True) == {
        "prompt": "a b",
        "add_special_tokens": False,
    }
    assert sent(TOKENIZE, prompt="a b", add_special=False) == {"prompt": "a b", "add_special_tokens": False}
    call = Call(TOKENIZE, {"content": "a b", "with_pieces": True}, "r")
    body = Answer(call, "m", Report(), " abc".__getitem__).body(b'{"count":2,"max_model_len":8,"tokens":[1,2]}')
    assert json.loads(body)["tokens"] == [{"id": 1, "piece": "a"}, {"id": 2, "piece": "b"}]
    assert json.loads(Answer(Call(DETOKENIZE, {}, "r"), "m", Report()).body(b'{"prompt":"x"}'))["content"] == "x"


USAGE = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7, "prompt_tokens_details": {"cached_tokens": 4}}
TIMES = {"time_to_first_token_ms": 20.0, "generation_time_ms": 30.0, "queue_time_ms": 1.0}


def event(**fields: Any) -> bytes:
    return f"data: {json.dumps({'id': 'chatcmpl-r', 'model': 'm', **fields}, separators=(',', ':'))}\n\n".encode()


def choice(content: str = "", finish: str | None = None, **delta: Any) -> dict[str, Any]:
    return {"index": 0, "delta": {"content": content, **delta}, "finish_reason": finish}


def played(model: str, stream_options: dict[str, Any] | None = None) -> tuple[list[dict[str, Any]], Report, bytes]:
    """The events that a client gets of a short stream, the report, and the stream as bytes."""
    fields = {"model": model, "messages": HELLO, "stream": True, "stream_options": stream_options}
    report = Report(ttft_ms=25.0, total_ms=60.0)
    answer = Answer(Call(CHAT, fields, "r"), "m", report)
    said = [
        event(choices=[choice('a "model":"m"')]),
        event(choices=[choice(reasoning="hm")]),
        event(choices=[choice("b", "stop")]),
        event(choices=[], usage=USAGE, metrics=TIMES),
        b"data: [DONE]\n\n",
    ]
    raw = b"".join(map(answer.event, said))
    parts = raw.decode().split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]], report, raw


def test_the_last_event_has_the_metrics_and_no_usage_that_was_not_asked_for():
    events, report, _ = played("alias")
    assert [each["choices"][0]["finish_reason"] for each in events] == [None, None, "stop"]
    assert {each["model"] for each in events} == {"alias"}
    assert events[0]["choices"][0]["delta"]["content"] == 'a "model":"m"', "what is said is left alone"
    assert events[1]["choices"][0]["delta"]["reasoning_content"] == "hm"
    assert not any("usage" in each for each in events)
    metrics = events[-1]["metrics"]
    assert (metrics["engine_prompt_tokens"], metrics["engine_output_tokens"]) == (5, 2)
    assert metrics["engine_total_wall_ms"] >= metrics["backend_inference_wall_ms"] == 50.0
    assert (report.cached_tokens, report.queue_ms, report.tokenize_ms) == (4, 1.0, 4.0)


def test_usage_that_was_asked_for_comes_last_with_the_metrics():
    events, _, _ = played("m", {"include_usage": True})
    assert [len(each["choices"]) for each in events] == [1, 1, 1, 0]
    assert events[-1]["usage"] == USAGE
    assert events[-1]["metrics"]["engine_output_tokens"] == 2
    assert "metrics" not in events[2]


def test_a_body_has_metrics_and_the_clients_name():
    said = {
        "model": "m",
        "choices": [{"message": {"content": "x", "reasoning": "hm"}}],
        "usage": USAGE,
        "metrics": TIMES,
    }
    report = Report(total_ms=60.0)
    body = json.loads(Answer(Call(CHAT, {"model": "alias"}, "r"), "m", report).body(json.dumps(said).encode()))
    assert body["model"] == "alias"
    assert body["choices"][0]["message"] == {"content": "x", "reasoning_content": "hm"}
    assert body["metrics"]["backend_inference_wall_ms"] == 50.0
    assert report.prompt_tokens == 5


def test_an_error_in_mid_stream_is_raised():
    answer = Answer(Call(CHAT, {"stream": True}, "r"), "m", Report())
    with pytest.raises(BackendUnavailable, match="gone"):
        answer.event(b'data: {"error": {"message": "gone", "type": "InternalServerError", "code": 500}}\n\n')


@pytest.mark.parametrize(
    ("status", "message", "kind"),
    [
        (400, "This model's maximum context length is 8 tokens. However, …", ContextLengthExceeded),
        (400, "max_tokens=9000 cannot be greater than max_model_len=8.", ContextLengthExceeded),
        (400, "logprobs must be positive", InvalidRequest),
        (404, "not here", InvalidRequest),
        (429, "too much", RateLimited),
        (500, "broken", BackendUnavailable),
        (503, "full", BackendUnavailable),
    ],
)
def test_vllms_errors_are_the_pools(status: int, message: str, kind: type[PoolError]):
    error = refusal(status, json.dumps({"error": {"message": message, "param": "x", "code": status}}).encode(), {})
    assert type(error) is kind
    assert error.message == message
    assert type(refusal(status, b"nonsense", {})) in (InvalidRequest, RateLimited, BackendUnavailable)
