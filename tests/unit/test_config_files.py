"""Configurations in the shapes of other projects, several files at once, and the schema for editors."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import referencing
import yaml

from app.cli.document import lay_over
from cluster.config import ConfigError, load_config, service_of
from cluster.config.schema import POOL, SERVE, schemas, text

SETTINGS = {
    "service": {"host": "127.0.0.1", "port": 9100, "log_level": "info"},
    "engine": {
        "backend": "fake",
        "capacity": 2,
        "models": {"a": {"target_inflight": 2}, "b": {"backend": "llama_cpp", "model_path": "/b.gguf"}},
    },
}
LISTED = """
- {name: writer, type: llm, execution_mode: gpu, backend: fake, gpu_id: 1, port: 8101, idle_timeout: 60}
- {name: small, execution_mode: cpu, format: gguf, model_path: /small.gguf}
"""


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    file = tmp_path / "settings.json"
    file.write_text(json.dumps(SETTINGS))
    return file


def test_settings_become_a_pool(settings: Path):
    config = load_config({"config": str(settings)}, environ={})
    assert (config.models["a"].backend, config.models["b"].backend, config.capacity) == ("fake", "llama_cpp", 2)
    assert service_of({"config": str(settings)}, {}) == ("127.0.0.1", 9100, "info")


def test_the_local_file_is_laid_over_the_settings(settings: Path, tmp_path: Path):
    local = {"service": {"port": 9200}, "engine": {"capacity": 1, "models": {"a": {"idle_timeout": 5}}}}
    (tmp_path / "local.json").write_text(json.dumps(local))
    config = load_config({"config": str(settings)}, environ={})
    assert (config.capacity, config.models["a"].target_inflight, config.models["a"].idle_timeout) == (1, 2, 5)
    assert service_of({"config": str(settings)}, {}).port == 9200
    other = tmp_path / "elsewhere.json"
    other.write_text(json.dumps({"engine": {"capacity": 7}}))
    environ = {"LLM_POOL_LOCAL_SETTINGS_PATH": str(other), "INFERENCE_QUEUE_MAX_SIZE": "3"}
    config = load_config({"config": str(settings)}, environ=environ)
    assert (config.capacity, config.models["a"].idle_timeout, config.queue_max_size) == (7, None, 3)


@pytest.mark.parametrize("top", ["{}", "models:"])
def test_a_list_of_models_becomes_a_pool(tmp_path: Path, top: str):
    file = tmp_path / "models.yaml"
    file.write_text(LISTED if top == "{}" else "models:" + LISTED)
    config = load_config({"config": str(file)}, environ={})
    writer, small = config.models["writer"], config.models["small"]
    assert (writer.num_gpus, writer.gpu, writer.idle_timeout) == (1, ("1",), 60)
    assert (small.backend, small.num_gpus) == ("llama_cpp", 0)


def test_files_of_the_environment_come_together_but_an_id_stands_in_one(settings: Path, tmp_path: Path):
    listed = tmp_path / "models.yaml"
    listed.write_text(LISTED)
    environ = {"LLM_POOL_SETTINGS_PATH": str(settings), "MODELS_CONFIG_PATH": str(listed)}
    config = load_config({"models": {"own": {"backend": "fake"}}, "capacity": 9}, environ=environ)
    assert sorted(config.models) == ["a", "b", "own", "small", "writer"]
    assert config.capacity == 9
    with pytest.raises(ConfigError, match=r"'writer' stands in serve_config.yaml: args and in models.yaml"):
        load_config({"models": {"writer": {"backend": "fake"}}}, environ=environ)
    # The one that was named already is not read twice.
    assert load_config({"config": str(listed)}, environ={"MODELS_CONFIG_PATH": str(listed)}).models


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("settings.json", '{"engine": {"models": {"a": {"backend": "fak"}}}}', "did you mean 'fake'"),
        ("settings.json", '{"engine": {"modles": {}}}', "modles: unknown key, did you mean 'models'"),
        ("settings.json", '{"service": {"prot": 1}}', "service.prot: unknown key"),
        ("settings.json", '{"service": {"port": "1"}}', "port a number"),
        ("settings.json", '{"engine": 1}', "must be mappings"),
        ("settings.json", '{"engine":\n,}', "line 2: not JSON"),
        ("models.yaml", "- {type: llm}", "models.0: a mapping with a name"),
        (
            "models.yaml",
            "- {name: a, backend: fake}\n- {name: a, backend: fake}",
            "models.1: the model 'a' stands there",
        ),
        ("models.yaml", "- {name: a, format: onnx}", "models.0.format: 'onnx' is none of gguf, hf, awq"),
        ("models.yaml", "- {name: a, execution_mode: tpu}", "'tpu' is neither gpu nor cpu"),
        ("pool.yaml", "7", "expected a mapping"),
    ],
)
def test_a_mistake_is_told_with_its_file_and_place(tmp_path: Path, name: str, content: str, message: str):
    file = tmp_path / name
    file.write_text(content)
    with pytest.raises(ConfigError, match=message) as told:
        load_config({"config": str(file)}, environ={})
    assert name in str(told.value)
    assert str(tmp_path) not in str(told.value)


def test_the_command_line_listens_where_the_settings_say(settings: Path, monkeypatch: pytest.MonkeyPatch):
    document = {"applications": [{"name": "slotpool"}], "http_options": {"port": 1}}
    merged = lay_over(document, settings, None)
    assert merged["http_options"] == {"host": "127.0.0.1", "port": 9100}
    assert merged["logging_config"] == {"log_level": "INFO"}
    assert lay_over(document, settings, 7)["http_options"]["port"] == 7
    monkeypatch.setenv("ROUTER_PORT", "no")
    with pytest.raises(ConfigError, match="ROUTER_PORT: 'no'"):
        lay_over(document, settings, None)


def test_the_published_schema_is_the_schema():
    for name, schema in schemas().items():
        assert Path("docs", name).read_text() == text(schema), "make docs"


def test_the_schema_takes_what_the_pool_takes_and_refuses_a_mistyped_key():
    made = schemas()
    pool = jsonschema.Draft202012Validator(made[POOL])
    keys = {"models": {"a": {"backend": "fake", "gpu": 0, "num_gpus": 1, "replicas": 1, "group": "g"}}}
    pool.validate({**keys, "api_keys": ["env:KEY", {"name": "n", "key": "env:KEY"}]})
    with pytest.raises(jsonschema.ValidationError):
        pool.validate({"models": {"a": {"backend": "fake", "gpus": 1}}})
    with pytest.raises(jsonschema.ValidationError):
        pool.validate({"modles": {}})
    resources = [(POOL, referencing.Resource.from_contents(made[POOL]))]
    serve = jsonschema.Draft202012Validator(made[SERVE], registry=referencing.Registry().with_resources(resources))
    serve.validate(yaml.safe_load(Path("serve_config.yaml").read_text()))
