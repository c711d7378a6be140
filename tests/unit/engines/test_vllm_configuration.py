"""What a configuration says of a vLLM model, and what vLLM is told. No vLLM is needed."""

from __future__ import annotations

import os
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from cluster.config import ConfigError, ModelConfig, VllmModel, load_config
from cluster.errors import ModelUnavailable
from deployments.engines import registry
from deployments.engines.vllm import arguments, memory
from deployments.engines.vllm.engine import VllmEngine
from deployments.engines.vllm.leftovers import LIST, left_over, own_folder, remove
from deployments.engines.vllm.routes import routes_of
from deployments.schemas import CHAT, EMBEDDINGS, TOKENIZE


def model(**fields: Any) -> VllmModel:
    found = ModelConfig.model_validate({"backend": "vllm", "model_path": "/models/m", **fields})
    assert isinstance(found, VllmModel)
    return found


def test_engine_kwargs_go_through():
    given = model(engine_kwargs={"max_model_len": 4096, "quantization": "awq"})
    assert given.engine_kwargs == {"max_model_len": 4096, "quantization": "awq"}
    assert (given.context_length, given.format, given.formats) == (4096, "hf", ("hf", "awq"))
    assert model().context_length is None
    assert model(engine_kwargs=None).engine_kwargs == {}


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("tensor_parallel_size", "num_gpus"),
        ("max-num-seqs", "target_inflight"),
        ("served_model_name", "aliases"),
        ("port", "the pool's own"),
        ("--max-model-len", "did you mean 'max_model_len'"),
    ],
)
def test_what_is_the_pools_to_say_is_refused_at_once(name: str, hint: str):
    with pytest.raises(ConfigError, match=rf"models\.m\.engine_kwargs: {name}.*{hint}"):
        load_config({"models": {"m": {"backend": "vllm", "model_path": "/m", "engine_kwargs": {name: 1}}}}, {})


def test_a_model_needs_a_folder():
    with pytest.raises(ValidationError, match="model_path is required"):
        ModelConfig.model_validate({"backend": "vllm"})


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {"tensor_parallel_size": 1, "enable_sleep_mode": False, "runner": None, "max_num_seqs": 8}),
        (
            {"num_gpus": 4, "target_inflight": 64},
            {"tensor_parallel_size": 4, "enable_sleep_mode": True, "max_num_seqs": 64},
        ),
        ({"num_gpus": 1, "sleep_level": 2}, {"enable_sleep_mode": False}),
        ({"num_gpus": 0.5}, {"gpu_memory_utilization": 0.45, "tensor_parallel_size": 1}),
        ({"num_gpus": 0.5, "engine_kwargs": {"gpu_memory_utilization": 0.3}}, {"gpu_memory_utilization": 0.3}),
        ({"type": "embedding"}, {"runner": "pooling"}),
        ({"enable_thinking": False}, {"default_chat_template_kwargs": {"enable_thinking": False}}),
        ({}, {"default_chat_template_kwargs": None}),
        ({}, {"tool_call_parser": "hermes", "enable_auto_tool_choice": True, "scheduling_policy": "priority"}),
    ],
)
def test_what_vllm_is_told(fields: dict[str, Any], expected: dict[str, Any]):
    given = arguments.given_to("m", model(**fields), "/models/m")
    assert {name: given.get(name) for name in expected} == expected
    assert (given["model"], given["served_model_name"]) == ("/models/m", ["m"])


def test_arguments_as_they_would_be_typed():
    given = {
        "max_model_len": 8,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "served_model_name": ["m", "-n"],
        "compilation_config": {"level": 0},
        "revision": None,
        "chat_template": "--{{ x }}",
    }
    assert arguments.command_line(given) == [
        "--max-model-len=8",
        "--enforce-eager",
        "--no-enable-prefix-caching",
        "--served-model-name",
        "m",
        "-n",
        '--compilation-config={"level": 0}',
        "--chat-template=--{{ x }}",
    ]


def test_reasons_name_no_path_of_this_machine():
    error = ValueError(
        "1 validation error for ModelConfig\n  Value error, no /opt/models/secret/config.json in /srv/x/ [type=x, in=…"
    )
    assert arguments.reason_of(error, "/opt/models/secret") == "Value error, no the model/config.json in a path"


def test_an_unknown_argument_is_told_the_nearest():
    with pytest.raises(ModelUnavailable, match="no argument 'max_model_length', did you mean 'max_model_len'"):
        arguments.check_names({"max_model_length": 1}, ["max_model_len", "max_num_seqs"])


def test_memory_is_estimated_on_the_host_only(tmp_path: Path):
    (tmp_path / "model.safetensors").write_bytes(b"x" * 10 * memory.MIB)
    given = {"engine_kwargs": {"kv_cache_memory_bytes": 64 * memory.MIB}}
    assert registry.estimate_mib(model(**given), tmp_path) == 11 + 64 + memory.HOST_BASE_MIB
    assert registry.estimate_mib(model(num_gpus=1, **given), tmp_path) is None
    assert registry.estimate_mib(model(), tmp_path / "away") is None


def test_what_clients_are_offered():
    assert registry.capabilities(model()) == ["chat", "completions", "detokenize", "tokenize"]
    assert {"embeddings", "rerank", "score"} <= set(registry.capabilities(model(type="rerank")))
    assert CHAT in routes_of(("generate",))
    assert EMBEDDINGS not in routes_of(("generate",))
    assert routes_of(("embed", "token_embed")) >= {EMBEDDINGS, "/v1/rerank", TOKENIZE}
    assert routes_of(("transcription",)) >= {"/v1/audio/transcriptions"}
    assert registry.backend_of(model()).paths >= routes_of(("generate", "embed", "transcription"))
    assert not any("/load_lora" in path or "/scale" in path for path in registry.backend_of(model()).paths)


async def test_an_engine_that_cannot_sleep_says_so():
    with pytest.raises(ModelUnavailable, match="cannot sleep"):
        await VllmEngine("m", model(), "/models/m").sleep()


async def test_where_vllm_is_not_installed_a_load_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    for name in [*arguments.ENVIRONMENT, "VLLM_RPC_BASE_PATH"]:
        monkeypatch.delenv(name, raising=False)
    engine = VllmEngine("m", model(), "/models/m")
    with pytest.raises(ModelUnavailable, match="vLLM is not installed"):
        await engine.load(lambda _: None)
    await engine.unload()


def test_what_engines_that_are_gone_have_left_is_removed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    for name in ("vllm-99999999", "vllm-1", "vllm-x"):
        (tmp_path / name).mkdir()
    shared = tmp_path / "psm_1"
    shared.write_text("x")
    (tmp_path / "vllm-99999999" / LIST).write_text(f"{shared}\n{tmp_path / 'away'}\n")
    own = own_folder()
    assert own == own_folder()
    assert {each.name for each in tmp_path.iterdir()} == {own.name, "vllm-1", "vllm-x"}


def test_shared_memory_is_known_while_it_lives(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    memory = SharedMemory(create=True, size=4096)
    try:
        found = left_over(os.getpid())
        assert found == [Path("/dev/shm", memory.name), own_folder()]
        assert (own_folder() / LIST).read_text() == f"/dev/shm/{memory.name}\n"
        remove(found)
        assert not any(path.exists() for path in found)
    finally:
        resource_tracker.unregister(f"/{memory.name}", "shared_memory")
        memory.close()
