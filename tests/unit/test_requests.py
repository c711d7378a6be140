"""What the front door refuses before a lease is asked for, and what it hands on."""

from __future__ import annotations

import pickle

import pytest

from cluster import errors
from cluster.config import Caller, load_config
from cluster.ledger.events import Reject
from cluster.ledger_calls import as_error
from deployments.requests import CHAT, COMPLETIONS, TRUSTED, parse_request

CONFIG = load_config(
    {"models": {"a": {"backend": "fake", "aliases": ["nick"]}}, "request_timeout_seconds": 100}, environ={}
)
CHAT_BODY = {"model": "a", "messages": [{"role": "user", "content": "hi"}]}


def ask(body, path=CHAT, headers=None, caller=TRUSTED):
    request, _ = parse_request(CONFIG, path, body, request_id="r", headers=headers, caller=caller)
    return request


def engine_body(body, path=CHAT):
    return parse_request(CONFIG, path, body, request_id="r")[1]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_tokens": "12"}, "max_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"stream": "yes"}, "stream"),
        ({"n": 0}, "n"),
        ({"stop": 5}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": "high"}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"n": 129}, "n"),
        ({"seed": 1.5}, "seed"),
        ({"repetition_penalty": 5}, "repetition_penalty"),
        ({"logit_bias": {"a": 1}}, "logit_bias.a"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": "x"}, "stream_options"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {}}, "response_format"),
        ({"tools": {}}, "tools"),
        ({"grammar": 5}, "grammar"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs"),
        ({"model": 5}, "model"),
        ({"priority": "urgent"}, "priority"),
        ({"priority": 4}, "priority"),
        ({"priority": True}, "priority"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
    ],
)
def test_bad_fields_are_named(change, param):
    with pytest.raises(errors.InvalidRequest) as caught:
        ask({**CHAT_BODY, **change})
    assert caught.value.param == param
    assert caught.value.status == 400


@pytest.mark.parametrize("body", [None, [], "x", 5])
def test_the_body_must_be_an_object(body):
    with pytest.raises(errors.InvalidRequest):
        ask(body)


def test_models():
    with pytest.raises(errors.ModelRequired) as missing:
        ask({"messages": CHAT_BODY["messages"]})
    assert missing.value.body()["error"]["hint"]
    with pytest.raises(errors.ModelNotFound) as unknown:
        ask({**CHAT_BODY, "model": "b"})
    assert unknown.value.status == 404
    assert unknown.value.body()["error"]["available_models"] == ["a"]
    assert ask({**CHAT_BODY, "model": "nick"}).model == "a"


def test_the_pool_keeps_its_own_fields_from_the_engine():
    body = {**CHAT_BODY, "priority": "HIGH", "keep_alive": -1, "timeout_s": 5, "allow_remote": True, "top_k": -1}
    assert engine_body(body) == {**CHAT_BODY, "top_k": -1}
    parsed = ask(body)
    assert (parsed.priority, parsed.keep_alive_s, parsed.timeout_s) == (1, -1, 5)


def test_headers_count_unless_the_body_says_otherwise():
    headers = {"x-priority": "low", "x-request-timeout": "7"}
    assert (ask(CHAT_BODY, headers=headers).priority, ask(CHAT_BODY, headers=headers).timeout_s) == (3, 7)
    assert ask({**CHAT_BODY, "priority": 1}, headers=headers).priority == 1
    assert ask({**CHAT_BODY, "timeout_s": 1000}).timeout_s == 100
    for bad in ({"x-priority": "no"}, {"x-request-timeout": "-1"}, {"x-request-timeout": "nan"}):
        with pytest.raises(errors.InvalidRequest):
            ask(CHAT_BODY, headers=bad)


def test_what_a_key_allows():
    guest = Caller("guest", may_pin=False, models=("nick",), best_priority=2)
    asked = ask({**CHAT_BODY, "priority": "high", "keep_alive": -1}, caller=guest)
    assert (asked.principal, asked.priority, asked.keep_alive_s) == ("guest", 2, 3600)
    modest = ask({**CHAT_BODY, "priority": "low", "keep_alive": 5}, caller=guest)
    assert (modest.priority, modest.keep_alive_s) == (3, 5)
    assert ask({**CHAT_BODY, "keep_alive": 1e9}, caller=guest).keep_alive_s == 3600
    assert ask(CHAT_BODY, caller=guest).keep_alive_s is None
    assert ask({**CHAT_BODY, "keep_alive": -1}, caller=Caller("boss")).keep_alive_s == -1
    with pytest.raises(errors.Forbidden) as refused:
        ask(CHAT_BODY, caller=Caller("other", models=("b",)))
    assert refused.value.body()["error"]["available_models"] == ["b"]
    with pytest.raises(errors.ModelNotFound) as unknown:
        ask({**CHAT_BODY, "model": "nobody"}, caller=Caller("other", models=("b",)))
    assert unknown.value.body()["error"]["available_models"] == [], "the others are none of its business"


@pytest.mark.parametrize("prompt", ["x", "", ["x", "y"], [1, 2], [[1], [2]]])
def test_every_shape_of_prompt(prompt):
    assert engine_body({"model": "a", "prompt": prompt}, COMPLETIONS)["prompt"] == prompt


@pytest.mark.parametrize(
    ("path", "fields", "slots"),
    [
        (CHAT, {}, 1),
        (CHAT, {"n": 3}, 3),
        (COMPLETIONS, {"prompt": "x", "n": 2}, 2),
        (COMPLETIONS, {"prompt": [1, 2, 3]}, 1),
        (COMPLETIONS, {"prompt": ["x", "y", "z"], "n": 2}, 6),
        (COMPLETIONS, {"prompt": [[1], [2]], "n": None}, 2),
    ],
)
def test_a_request_asks_for_a_slot_for_each_choice_of_each_prompt(path, fields, slots):
    request = ask({**CHAT_BODY, **fields}, path)
    assert (request.slots, request.path, request.trace) == (slots, path, "r")


@pytest.mark.parametrize("prompt", [[], [[]], [1, "x"], [-1], [True], ["x"] * 3000])
def test_prompts_that_are_none(prompt):
    with pytest.raises(errors.InvalidRequest) as caught:
        ask({"model": "a", "prompt": prompt}, COMPLETIONS)
    assert caught.value.param.split(".")[0] == "prompt"


def test_a_request_has_a_bounded_number_of_sequences():
    with pytest.raises(errors.InvalidRequest) as caught:
        ask({"model": "a", "prompt": ["x"] * 1000, "n": 100}, COMPLETIONS)
    assert caught.value.param == "n"


def test_completions_may_score_a_prompt_and_make_nothing():
    assert engine_body({"model": "a", "prompt": "x", "max_tokens": 0}, COMPLETIONS)["max_tokens"] == 0


def test_the_model_is_looked_at_first():
    wrong = {"temperature": 9, "messages": []}
    with pytest.raises(errors.ModelRequired):
        ask(wrong)
    with pytest.raises(errors.ModelRequired):
        ask({**wrong, "model": ""})
    with pytest.raises(errors.ModelNotFound):
        ask({**wrong, "model": "nobody"})
    with pytest.raises(errors.Forbidden):
        ask({**wrong, "model": "a"}, caller=Caller("other", models=("b",)))
    with pytest.raises(errors.InvalidRequest):
        ask({**wrong, "model": "a"})


def test_the_mistake_of_a_union_is_the_one_that_was_made():
    with pytest.raises(errors.InvalidRequest, match="at most 16 items"):
        ask({**CHAT_BODY, "stop": ["x"] * 17})


def test_a_bad_prompt_is_named_without_pydantics_words():
    with pytest.raises(errors.InvalidRequest) as caught:
        ask({"model": "a", "prompt": {"x": 1}}, COMPLETIONS)
    assert caught.value.param == "prompt"


def test_errors_cross_process_borders():
    error = errors.QueueFull("full", param="p", retry_after=2.5, phase="queued")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is errors.QueueFull
    assert again.body() == error.body()
    assert again.status == 429


def test_a_refusal_of_the_ledger_becomes_its_error():
    error = as_error(Reject("r", "h", "BackendTimeout", "too late", {"phase": "loading"}))
    assert (type(error), error.status) == (errors.BackendTimeout, 504)
    assert error.body()["error"]["phase"] == "loading"


def test_a_name_that_no_model_can_have_goes_nowhere():
    """Also where a server might have it: half a character could not be sent to the ledger."""
    config = load_config({"servers": [{"url": "http://x:1"}]}, environ={})
    for name in ("\ud800", "a\nb", "x" * 600):
        with pytest.raises(errors.InvalidRequest, match="no model has such a name"):
            parse_request(config, CHAT, {"model": name, "messages": []}, request_id="r")
