"""One entry for each backend, and nothing of an engine imported before it is used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cluster.config import ModelConfig
from deployments.engines import registry
from deployments.engines.fake import FakeEngine
from deployments.engines.protocol import Sleeper


def test_every_configurable_backend_has_an_entry() -> None:
    assert {name: backend.config for backend in registry.BACKENDS for name in backend.names} == ModelConfig.backends


def test_an_engine_is_built_from_its_models_configuration() -> None:
    model = ModelConfig.model_validate({"backend": "fake", "engine_kwargs": {"tokens": 3}})
    assert isinstance(registry.build_engine("m", model, ""), FakeEngine)
    assert registry.estimate_mib(model, Path("/nowhere")) is None
    gguf = ModelConfig.model_validate({"backend": "gguf", "model_path": "/nowhere.gguf"})
    assert registry.backend_of(gguf).names[0] == "llama_cpp"
    assert registry.capabilities(gguf) == ["chat", "completions", "detokenize", "embeddings", "tokenize"]
    assert "/v1/chat/completions" in registry.backend_of(gguf).paths


def test_what_the_dialect_asks_for_is_used_where_the_engine_can() -> None:
    converted = ModelConfig.model_validate({"backend": "ct2", "model_path": "/nowhere"})
    assert registry.unused_decoding(converted) == frozenset()
    assert "beam_size" in registry.unused_decoding(ModelConfig.model_validate({"backend": "fake"}))
    assert "embeddings" not in registry.capabilities(converted)


#: What a model of a backend must say beside its path.
NEEDED = {
    "server": {"engine_kwargs": {"command": "serve ${PORT}"}},
    "openai_compatible": {"remote_base_url": "http://127.0.0.1:9/v1", "remote_model": "m", "remote_api_key_env": "KEY"},
}


@pytest.mark.parametrize("backend", registry.BACKENDS, ids=lambda backend: backend.names[0])
def test_a_backend_sleeps_if_its_engines_can(backend: registry.Backend) -> None:
    name = backend.names[0]
    path = {} if name == "openai_compatible" else {"model_path": "/nowhere.gguf"}
    model = backend.config.model_validate({"backend": name, **path, **NEEDED.get(name, {})})
    assert isinstance(registry.build_engine("m", model, "/nowhere.gguf"), Sleeper) == backend.config.sleeps


@pytest.mark.parametrize("library", ["llama_cpp", "ctranslate2", "tokenizers", "numpy", "jinja2"])
def test_naming_the_backends_imports_no_engine(library: str) -> None:
    code = f"import sys, deployments.engines.registry; sys.exit({library!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
