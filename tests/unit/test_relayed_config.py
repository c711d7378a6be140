"""Models whose engine is another server: what their keys mean, which mistakes are told, what a launch line says."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster import errors
from cluster.config import ConfigError, Configuration, ModelConfig, PoolConfig, SglangModel, load_config
from cluster.config.version import patched, with_model
from cluster.owned_config import OwnedConfiguration
from deployments.engines.launch import launch_of
from deployments.requests import parse_raw, parse_request

CHAT = "/v1/chat/completions"
SERVER = {"backend": "server", "engine_kwargs": {"command": "serve --port ${PORT} --cost '$$5 a day' -m ${MODEL_PATH}"}}
REMOTE = {"backend": "openai_compatible", "remote_base_url": "https://api.example.com", "remote_api_key_env": "KEY"}


def pool(environ: dict[str, str] | None = None, **models: dict[str, Any]) -> PoolConfig:
    return load_config({"models": models}, environ=environ or {})


def line(config: PoolConfig, model: str, path: str = "/models/x") -> tuple[str, ...]:
    engine = config.model_in_pool(config.models[model])
    return launch_of(model, engine, path, 4711).command  # type: ignore[arg-type]


def test_macros_stand_for_what_they_say_and_one_word_stays_one():
    config = pool(a={**SERVER, "model_path": "/models/a b.gguf", "target_inflight": 5})
    given = {"command": ["${PYTHON}", "x.py", "${PORT}"], "args": "--id ${MODEL_ID}:${SLOTS}", "env": {"P": "${PORT}"}}
    config = pool(
        a={**SERVER, "model_path": "/models/a b.gguf"}, b={**SERVER, "engine_kwargs": given, "target_inflight": 5}
    )
    assert line(config, "a", "/models/a b.gguf") == (
        *("serve", "--port", "4711", "--cost", "$5 a day", "-m", "/models/a b.gguf"),
    )
    assert line(config, "b") == (sys.executable, "x.py", "4711", "--id", "b:5")
    launch = launch_of("b", config.models["b"], "", 4711)  # type: ignore[arg-type]
    assert (launch.environment, launch.ready_path) == ({"P": "4711"}, "/health")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "exactly one of command and preset"),
        ({"command": "x ${PORT}", "preset": "vllm"}, "exactly one of command and preset"),
        ({"command": "x"}, "nobody would find the server"),
        ({"command": "x ${PROT}"}, "did you mean PORT"),
        ({"command": "x ${PORT}", "args": "$"}, "begins a macro"),
        ({"command": "x ${PORT}", "env": {"A": "${HOME}"}}, "no such macro"),
        ({"command": "x ${PORT}", "ready_path": "health"}, "should match pattern"),
        ({"comand": "x"}, "did you mean 'command'"),
    ],
)
def test_mistakes_in_a_command_are_told(kwargs: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        pool(a={"backend": "server", "engine_kwargs": kwargs})


def test_presets():
    config = pool(
        v={"backend": "server", "model_path": "/m", "engine_kwargs": {"preset": "vllm", "args": "--dtype float16"}},
        l={"backend": "server", "model_path": "/m.gguf", "engine_kwargs": {"preset": "llama-server"}},
    )
    assert line(config, "v")[:3] == ("vllm", "serve", "/models/x")
    assert line(config, "v")[-4:] == ("--max-num-seqs", "8", "--dtype", "float16")
    assert line(config, "l")[:3] == ("llama-server", "--model", "/models/x")
    assert "4711" in line(config, "l")
    with pytest.raises(ConfigError, match="model_path is required for the preset vllm"):
        pool(v={"backend": "server", "engine_kwargs": {"preset": "vllm"}})


def test_sglangs_bounds_stand_on_every_line():
    config = pool(a={"backend": "sglang", "model_path": "/m", "num_gpus": 1})
    assert line(config, "a")[:3] == (sys.executable, "-m", "sglang.launch_server")
    assert line(config, "a")[-2:] == ("--max-running-requests", "3")
    assert "--enable-weights-cpu-backup" in line(config, "a")
    assert "--max-total-tokens" not in line(config, "a")
    assert config.spec().models["a"].slots == 3, "no more are let in than it runs"
    environ = {"SGLANG_MAX_RUNNING_REQUESTS": "16", "SGLANG_MAX_TOTAL_TOKENS": "4096"}
    config = pool(
        environ,
        a={"backend": "sglang", "model_path": "/m", "sleep_level": 2, "engine_kwargs": {"args": "--tp 2"}},
        b={"backend": "sglang", "model_path": "/m", "sglang_max_running_requests": 2, "sglang_max_total_tokens": 9999},
    )
    assert line(config, "a")[-6:] == ("--tp", "2", "--max-running-requests", "8", "--max-total-tokens", "4096")
    assert "--enable-memory-saver" not in line(config, "a")
    assert line(config, "b")[-4:] == ("--max-running-requests", "2", "--max-total-tokens", "4096")
    for given in ("--max-running-requests=9", "--max_total_tokens 9", "--port 1"):
        with pytest.raises(ConfigError, match="the pool sets this itself"):
            pool(a={"backend": "sglang", "model_path": "/m", "engine_kwargs": {"args": given}})


def test_the_order_to_load_carries_the_pools_bounds():
    environ = {"SGLANG_MAX_RUNNING_REQUESTS": "2"}
    config = pool(environ, a={"backend": "sglang", "model_path": "/m"})
    order = OwnedConfiguration(Configuration((1.0, 0), config)).load("a", ())
    model = ModelConfig.model_validate(order.config)
    assert isinstance(model, SglangModel)
    assert (model.slots, order.slots) == (2, 2)
    looser = pool({}, a={"backend": "sglang", "model_path": "/m"})
    assert config.spec().models["a"].revision != looser.spec().models["a"].revision


@pytest.mark.parametrize(
    ("keys", "preferred"),
    [
        ({"backend": "sglang", "model_path": "/m.gguf"}, ["hf", "awq"]),
        ({"backend": "sglang", "model_path": "/m", "format": "gguf"}, ["hf", "awq"]),
        ({"backend": "llama_cpp", "model_path": "/m.gguf", "format": "awq"}, ["gguf"]),
        ({"backend": "server", "model_path": "/m", "engine_kwargs": {"preset": "llama_server"}}, ["gguf"]),
    ],
)
def test_a_format_that_the_backend_does_not_read_is_refused(keys: dict[str, Any], preferred: list[str]):
    config = pool(a=keys)
    with pytest.raises(errors.FormatNotSupported) as refused:
        parse_request(config, CHAT, {"model": "a", "messages": [{"role": "user", "content": "x"}]}, request_id="r")
    error = refused.value
    assert (error.status, error.code, error.extras) == (400, "FORMAT_NOT_SUPPORTED", {"preferred_formats": preferred})


def test_a_list_of_models_says_the_format(tmp_path: Path):
    listed = tmp_path / "models.yaml"
    listed.write_text(
        "- {name: a, backend: sglang, format: gguf, model_path: /m, gpu_id: 1, port: 30000}\n"
        "- {name: b, backend: sglang, format: awq, model_path: /m}\n"
        "- {name: c, backend: openai_compatible, remote_base_url: 'https://x.example', remote_thinking: disabled}\n"
    )
    models = load_config({"config": str(listed)}, environ={}).models
    assert [models[name].format for name in "abc"] == ["gguf", "awq", None]
    assert [models[name].num_gpus for name in "abc"] == [1, 1, 0]


def test_settings_have_sglang_and_remote_models(tmp_path: Path):
    settings = tmp_path / "settings.json"
    remote = {**REMOTE, "remote_model": "big", "remote_timeout_s": 30, "remote_health_check": "config_only"}
    engine = {"backend": "sglang", "models": {"a": {"model_path": "/m"}, "b": {**remote, "remote_max_retries": 1}}}
    settings.write_text(json.dumps({"engine": engine}))
    models = load_config({"config": str(settings)}, environ={}).models
    assert [models[name].backend for name in "ab"] == ["sglang", "openai_compatible"]


def test_a_remote_model_is_asked_only_where_that_is_allowed():
    config = pool(a=REMOTE)
    body = {"model": "a", "messages": [{"role": "user", "content": "x"}]}
    for refused in (body, {**body, "allow_remote": False}):
        with pytest.raises(errors.Forbidden) as caught:
            parse_request(config, CHAT, refused, request_id="r")
        assert (caught.value.status, caught.value.code) == (403, "remote_execution_disallowed")
    with pytest.raises(errors.Forbidden):
        parse_raw(config, "/v1/audio/speech", "a", request_id="r")
    _, given = parse_request(config, CHAT, {**body, "allow_remote": True}, request_id="r")
    assert "allow_remote" not in given


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ({"a": REMOTE, "b": {"backend": "fake", "fallbacks": ["a"]}}, "models.b.fallbacks: 'a' is remote"),
        ({"a": REMOTE, "b": {"backend": "fake", "cpu_offload_model": "a"}}, "cpu_offload_model: 'a' is remote"),
        (
            {"a": {**REMOTE, "aliases": ["x"], "weight": 1}, "b": {"backend": "fake", "aliases": ["x"], "weight": 1}},
            "'a' is remote",
        ),
        ({"a": {**REMOTE, "num_gpus": 1}}, "a remote model has no num_gpus"),
        ({"a": {**REMOTE, "remote_base_url": "https://user:key@x.example"}}, "should match pattern"),
        ({"a": {**REMOTE, "remote_base_url": "https://x.example?key=1"}}, "should match pattern"),
        ({"a": {**REMOTE, "remote_api_kind": "responses"}}, "Input should be 'chat_completions'"),
    ],
)
def test_what_a_remote_model_cannot_be(models: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        pool(**models)


def test_by_a_request_no_new_command_is_run_and_no_key_sent_elsewhere():
    configuration = Configuration((1.0, 0), pool(a=SERVER, r=REMOTE))
    assert with_model(configuration, "b", {**SERVER, "target_inflight": 2})
    assert with_model(configuration, "b", {**REMOTE, "remote_model": "other"})
    assert with_model(
        configuration, "b", {**REMOTE, "remote_base_url": "https://y.example", "remote_api_key_env": None}
    )
    for keys in (
        {"backend": "server", "engine_kwargs": {"command": "rm ${PORT}"}},
        {"backend": "sglang", "model_path": "/m", "engine_kwargs": {"args": "--trust-remote-code"}},
        {**REMOTE, "remote_base_url": "https://y.example"},
        {**REMOTE, "remote_api_key_env": "HOME"},
    ):
        with pytest.raises(ConfigError, match="by a request only"):
            with_model(configuration, "b", keys)
    with pytest.raises(ConfigError, match="by a request only"):
        patched(configuration, "a", {"engine_kwargs": {"command": "rm ${PORT}"}})
    assert patched(configuration, "a", {"idle_timeout": 5})
