"""The configuration: defaults, both spellings, and errors that name the key."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from app.cli import lay_over
from cluster.config import ConfigError, FakeFaults, load_config
from cluster.ledger.specs import ServerSpec

FAKE = {"backend": "fake"}


def test_the_shipped_file_is_valid():
    document = yaml.safe_load(Path("serve_config.yaml").read_text())
    config = load_config(document["applications"][0]["args"], environ={})
    assert config.models["smollm2"].enabled
    assert config.resolve("default") == "smollm2"
    assert document["http_options"]["host"] == "127.0.0.1"
    assert document["applications"][0]["autoscaling_policy"] == {"policy_function": "cluster.scaling:LedgerPolicy"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"modles": {}}, "modles: unknown key, did you mean 'models'?"),
        (
            {"models": {"a": {**FAKE, "idle_timeot": 1}}},
            "models.a.idle_timeot: unknown key, did you mean 'idle_timeout'?",
        ),
        ({"models": {"a": {**FAKE, "engine_kwargs": {"lod_s": 1}}}}, "did you mean 'load_s'?"),
        ({"models": {"a": {**FAKE, "replicas": 3}}}, r"replicas \(3\) is larger than replica_max \(1\)"),
        ({"models": {"a": {}}}, "models.a: .*model_path is required for backend llama_cpp"),
        ({"models": {"a": {**FAKE, "num_gpus": 1.5}}}, "whole number of devices"),
        ({"models": {"a": {**FAKE, "aliases": ["b"]}, "b": FAKE}}, "'b' is already a model id"),
        ({"default_model": "x"}, "default_model: 'x' is not a configured model"),
        ({"queue_max_size": -1}, "queue_max_size"),
        ({"servers": [{"url": "http://h:1", "max_concurent": 1}]}, "did you mean 'max_concurrent'?"),
        ({"servers": [{"url": "h:1"}]}, r"servers\.0\.url"),
        ({"servers": [{"url": "http://user:secret@h:1"}]}, r"servers\.0\.url"),
        ({"servers": [{"url": "http://h:1", "max_concurrent": 0}]}, r"servers\.0\.max_concurrent"),
        ({"servers": [{"url": "http://h:1"}, {"url": "http://h:1/v1"}]}, "http://h:1/v1 stands there twice"),
        ({"config": "pool.yaml", "models": {}}, "'config' stands alone"),
        ({"config": "/nowhere/pool.yaml"}, "No such file"),
    ],
)
def test_mistakes_are_named(args, message):
    with pytest.raises(ConfigError, match=message):
        load_config(args, environ={})


def test_a_file_of_its_own_and_the_environment(tmp_path):
    file = tmp_path / "pool.yaml"
    file.write_text(yaml.safe_dump({"models": {"a": FAKE}, "queue_max_size": 5}))
    config = load_config({"config": str(file)}, environ={"INFERENCE_QUEUE_MAX_SIZE": "7", "DEFAULT_IDLE_TIMEOUT": "9"})
    assert config.queue_max_size == 7
    assert config.spec().models["a"].idle_timeout_s == 9


def test_both_spellings_of_the_replica_keys():
    config = load_config(
        {
            "models": {
                "a": {**FAKE, "replicas": 1, "replica_max": 2},
                "b": {**FAKE, "min_replicas": 1, "max_replicas": 2},
            }
        },
        environ={},
    )
    assert config.models["a"] == config.models["b"]
    assert isinstance(config.models["a"].engine_kwargs, FakeFaults)


def test_idle_timeout_zero_means_never_and_is_not_the_default():
    config = load_config({"models": {"a": {**FAKE, "idle_timeout": 0}, "b": FAKE}}, environ={})
    spec = config.spec()
    assert spec.models["a"].idle_timeout_s == 0
    assert spec.models["b"].idle_timeout_s == 300


def test_the_grace_period_covers_the_longest_request():
    config = load_config({"models": {"a": {**FAKE, "request_timeout": 5000}}}, environ={})
    assert config.longest_request_s() == 5000


def test_the_command_line_lies_over_the_file(tmp_path, monkeypatch):
    document = {"applications": [{"name": "slotpool", "args": {"models": {}}}], "http_options": {"port": 1}}
    merged = lay_over(document, tmp_path / "p.yaml", 9000)
    assert merged["http_options"] == {"host": "127.0.0.1", "port": 9000}
    assert merged["applications"][0]["args"] == {"config": str(tmp_path / "p.yaml")}
    monkeypatch.setenv("ROUTER_PORT", "9001")
    assert lay_over(document, None, None)["http_options"]["port"] == 9001
    with pytest.raises(ConfigError, match="exactly one application"):
        lay_over({"applications": []}, None, None)


def test_external_servers_become_slots():
    entries = [
        {"url": "http://one:1234", "max_concurrent": 2, "server_type": "lmstudio"},
        {"url": "http://two:8000/v1", "server_type": "vLLM", "api_key_env": "KEY"},
        {"url": "http://three:1"},
    ]
    config = load_config({"models": {"a": FAKE}, "servers": entries, "default_model": "theirs"}, environ={})
    assert config.spec().servers == (
        ServerSpec("http://one:1234", 2),
        ServerSpec("http://two:8000/v1", 1, False, "KEY"),
        ServerSpec("http://three:1"),
    )
    assert config.resolve("theirs") == "theirs"
    assert config.request_timeout_s("theirs") == 600
    assert config.server("http://three:1") == config.servers[2]
    assert config.server("a-replica") is None
    assert load_config({"models": {"a": FAKE}}, environ={}).resolve("theirs") is None
