"""Keys in the configuration: hashed when read, and in no message."""

from __future__ import annotations

import hashlib
import pickle

import pytest
import yaml

from cluster.config import ConfigError, find_key, load_config

SECRET = "sk-a-long-secret"
HEX = hashlib.sha256(SECRET.encode()).hexdigest()


def test_every_way_to_write_a_key(tmp_path):
    file = tmp_path / "pool.yaml"
    file.write_text(yaml.safe_dump({"api_keys": [SECRET, {"name": "team", "key": "other"}]}))
    ways = [
        load_config({"config": str(file)}, environ={}),
        load_config({"api_keys": [f"sha256:{HEX.upper()}"]}, environ={}),
        load_config({"api_keys": ["env:POOL_KEY"]}, environ={"POOL_KEY": f" {SECRET}\n"}),
        load_config({"api_keys": [{"key": "env:POOL_KEY"}]}, environ={"POOL_KEY": SECRET}),
    ]
    for config in ways:
        assert (config.api_keys[0].name, config.api_keys[0].key) == (f"key-{HEX[:8]}", f"sha256:{HEX}")
        assert SECRET.encode() not in pickle.dumps(config)
        assert HEX not in repr(config)
    assert ways[0].api_keys[1].name == "team"


def test_the_right_key_is_found():
    config = load_config({"api_keys": [{"name": "a", "key": f"sha256:{HEX}"}]}, environ={})
    assert find_key([b"x", SECRET.encode()], config.api_keys) == config.api_keys[0]
    assert find_key([HEX.encode(), f"sha256:{HEX}".encode(), b""], config.api_keys) is None
    assert find_key([], config.api_keys) is None


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"api_keys": [SECRET]}, r"args: api_keys\.0: a key in clear .* env:NAME or sha256:HEX .* sha256sum"),
        ({"admin_keys": [{"name": "a", "key": SECRET}]}, r"admin_keys\.0: a key in clear"),
        ({"api_keys": [f"sha256:{SECRET}"]}, r"api_keys\.0: sha256: must be followed by 64"),
        ({"api_keys": ["env:NOT_SET"]}, r"api_keys\.0: the environment variable NOT_SET is not set"),
        ({"api_keys": [f"env:{SECRET}"]}, r"api_keys\.0: env: must be followed by the name"),
        ({"api_keys": SECRET}, "api_keys: "),
        ({"api_keys": [12345]}, r"api_keys\.0: "),
        ({"api_keys": [{"key": 12345, "name": "x"}]}, r"api_keys\.0\.key: "),
        ({"api_keys": [{"name": "x"}]}, r"api_keys\.0\.key: "),
        ({"api_keys": [{"key": f"sha256:{HEX}", "modles": []}]}, "modles: unknown key, did you mean 'models'"),
        ({"api_keys": [{"key": f"sha256:{HEX}", "budget": {"request": 1}}]}, r"api_keys\.0\.budget\.request"),
        ({"api_keys": [{"key": f"sha256:{HEX}", "requests_per_minute": 0}]}, r"api_keys\.0\.requests_per_minute: "),
        ({"api_keys": [{"key": f"sha256:{HEX}", "max_concurrent": 0}]}, r"api_keys\.0\.max_concurrent: "),
        ({"api_keys": [{"key": f"sha256:{HEX}", "max_priority": "top"}]}, r"api_keys\.0\.max_priority: "),
        ({"api_keys": [{"key": f"sha256:{HEX}", "name": "anonymous"}]}, "'anonymous' is taken"),
        ({"api_keys": [{"key": f"sha256:{HEX}", "name": "a\nb"}]}, r"api_keys\.0\.name: "),
        (
            {"api_keys": [f"sha256:{HEX}"], "admin_keys": [f"sha256:{HEX}"]},
            r"admin_keys\.0: this key stands there twice",
        ),
        (
            {"api_keys": [{"key": f"sha256:{HEX}", "name": "a"}, {"key": f"sha256:{'0' * 64}", "name": "a"}]},
            r"api_keys\.1\.name: 'a' is taken",
        ),
        ({"model_roots": ["models"]}, "model_roots: 'models' is neither an absolute folder"),
        ({"max_keep_alive": 0}, "max_keep_alive"),
    ],
)
def test_mistakes_are_named_without_the_key(args, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(args, environ={"EMPTY": ""})
    assert SECRET not in str(caught.value)
    assert "12345" not in str(caught.value)


def test_a_broken_file_is_not_quoted(tmp_path):
    file = tmp_path / "pool.yaml"
    file.write_text(f"capacity: 1\napi_keys: [{SECRET}")
    with pytest.raises(ConfigError, match=r"pool.yaml: line \d: not YAML") as caught:
        load_config({"config": str(file)}, environ={})
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("text", ["[1]", "a: [", "modles: {}", "models: {m: {backend: fake, tokns: 1}}", None])
def test_a_mistake_tells_the_files_name_and_not_where_it_lies(tmp_path, text):
    file = tmp_path / "pool.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=r"^pool\.yaml: ") as caught:
        load_config({"config": str(file)}, environ={})
    assert str(tmp_path) not in str(caught.value)
