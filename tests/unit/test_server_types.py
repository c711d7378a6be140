"""What is known of the kinds of external servers."""

from __future__ import annotations

import pytest

from cluster.servers.types import FOREVER_S, base_url, hold_fields, loads_just_in_time


@pytest.mark.parametrize(
    ("kind", "just_in_time"),
    [
        *((kind, True) for kind in ("lmstudio", "LM Studio", "ollama", None, "my-own")),
        *((kind, False) for kind in ("vllm", "vLLM", "llama-server", "llama.cpp", "sglang")),
    ],
)
def test_only_known_kinds_run_several_models_at_once(kind, just_in_time):
    assert loads_just_in_time(kind) is just_in_time


@pytest.mark.parametrize(
    ("kind", "keep_alive_s", "fields"),
    [
        ("ollama", 300.0, {"keep_alive": 300}),
        ("ollama", -1, {"keep_alive": -1}),
        ("ollama", 0, {"keep_alive": 0}),
        ("LM-Studio", 300.0, {"ttl": 300}),
        ("lmstudio", -1, {"ttl": FOREVER_S}),
        ("lmstudio", 0.2, {"ttl": 1}),
        ("vllm", 300.0, {}),
        (None, 300.0, {}),
    ],
)
def test_the_hold_on_a_servers_own_eviction(kind, keep_alive_s, fields):
    assert hold_fields(kind, keep_alive_s) == fields


@pytest.mark.parametrize("url", ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"])
def test_a_url_may_be_given_with_v1(url):
    assert base_url(url) == "http://h:1"
