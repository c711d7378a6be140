"""What the front door refuses before a lease is asked for, and what it hands on."""

from __future__ import annotations

import pickle

import pytest

from cluster import errors
from cluster.client import as_error
from cluster.config import Caller, load_config
from cluster.ledger.events import Reject
from deployments.requests import CHAT, COMPLETIONS, TRUSTED, parse_ask

CONFIG = load_config(
    {"models": {"a": {"backend": "fake", "aliases": ["nick"]}}, "request_timeout_seconds": 100}, environ={}
)
CHAT_BODY = {"model": "a", "messages": [{"role": "user", "content": "hi"}]}


def ask(body, path=CHAT, headers=None, caller=TRUSTED):
    return parse_ask(CONFIG, path, body, request_id="r", headers=headers, caller=caller)


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
    parsed = ask({**CHAT_BODY, "priority": "HIGH", "keep_alive": -1, "timeout_s": 5, "allow_remote": True, "top_k": 3})
    assert parsed.body == {**CHAT_BODY, "top_k": 3}
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


@pytest.mark.parametrize("prompt", ["x", ["x", "y"], [1, 2], [[1], [2]]])
def test_every_shape_of_prompt(prompt):
    assert ask({"model": "a", "prompt": prompt}, COMPLETIONS).body["prompt"] == prompt


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
