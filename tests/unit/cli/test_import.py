"""Importers: the shapes that other programs document become a configuration, and each loss is a line."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from app.cli import cli
from app.cli.importers import llama_server
from app.cli.importers.ollama import MODEL_LAYER
from cluster.config import load_config

EXAMPLES = Path(__file__).parent / "examples"
KEYS = {"TEAM_KEY": "t", "OPENAI_API_KEY": "o", "GPT_4O_API_KEY": "g"}


def run(program: str, file: Path, *options: str) -> Result:
    return CliRunner().invoke(cli, ["import", program, str(file), *options])


def notes(result: Result) -> dict[str, tuple[int, str]]:
    """What was said of each key, with its line."""
    found = {}
    for line in result.stderr.splitlines():
        if line.startswith("Error: "):
            break
        _, number, key, message = line.split(":", 3)
        found[key.strip()] = (int(number), message.strip())
    return found


def pool_of(result: Result) -> Any:
    """The configuration as the pool reads it."""
    return load_config(yaml.safe_load(result.stdout), KEYS)


def test_llama_swap_becomes_a_pool():
    result = run("llama-swap", EXAMPLES / "llama_swap.yaml")
    written = yaml.safe_load(result.stdout)
    models = written["models"]
    assert models["qwen-coder"] == {
        "model_path": "/models/qwen-coder-7b-q4_k_m.gguf",
        "num_gpus": 1,
        "target_inflight": 4,
        "gguf_n_ctx": 8192,
        "gguf_flash_attn": "on",
        "gguf_type_k": "q8_0",
        "gguf_type_v": "q8_0",
        "gpu": ["1"],
        "aliases": ["coder", "gpt-4o-mini"],
        "idle_timeout": 300,
        "group": "coding",
        "enabled": True,
    }
    assert models["small"] == {
        "model_path": "/models/small.gguf",
        "num_gpus": 0,
        "target_inflight": 1,
        "gguf_n_ctx": 8192,
        "engine_kwargs": {"n_threads": 4},
        "idle_timeout": 0,
    }
    assert models["from-hub"]["model_path"] == "hf:owner/repo/repo-q4.gguf"
    assert models["from-hub"]["gguf_n_gpu_layers"] == 20
    assert models["embedder"]["type"] == "embedding"
    assert models["embedder"]["pinned"] is True
    assert models["whisper"] == {
        "backend": "server",
        "num_gpus": 1,
        "engine_kwargs": {
            "command": shlex.split("docker run --rm -p ${PORT}:8080 whisper:latest --model /models/whisper.bin"),
            "env": {"MODE": "fast"},
            "served_model": "whisper-1",
            "ready_path": "/ready",
        },
        "target_inflight": 2,
    }  # fmt: skip
    assert written["servers"] == [{"url": "http://192.168.1.23:8080", "max_concurrent": 4}]
    assert written["default_idle_timeout"] == 900
    assert written["startup_timeout"] == 90
    assert [each["key"][:7] for each in written["api_keys"]] == ["sha256:", "env:TEA"]
    assert "sk-clear" not in result.output


def test_what_llama_swap_loses_is_said_line_by_line():
    found = notes(run("llama-swap", EXAMPLES / "llama_swap.yaml"))
    lines = (EXAMPLES / "llama_swap.yaml").read_text().splitlines()
    for key, text in {
        "logLevel": "logLevel: info",
        "startPort": "startPort: 10001",
        "models.qwen-coder.env": "env:",
        "models.qwen-coder.filters": "filters:",
        "models.qwen-coder.cmd.--temp": "-ctk q8_0",
        "models.qwen-coder.cmd.--ctx-size": "--ctx-size 32768",
        "models.embedder.cmd.--mmproj": "cmd:",
        "models.embedder.unlisted": "unlisted: true",
        "models.whisper.cmdStop": "cmdStop:",
        "models.elsewhere.proxy": "proxy:",
        "groups.coding.exclusive": "exclusive: true",
    }.items():
        assert lines[found[key][0] - 1].strip().startswith(text), key
    assert "all slots are 8192 of each" in found["models.qwen-coder.cmd.--ctx-size"][1]
    assert not [key for key in found if "--jinja" in key or "--port" in key or "groups.forever" in key]


def test_a_llama_swap_configuration_of_llama_servers_is_loaded(tmp_path: Path):
    data = yaml.safe_load((EXAMPLES / "llama_swap.yaml").read_text())
    del data["models"]["whisper"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(data))
    result = run("llama-swap", tmp_path / "config.yaml")
    assert result.exit_code == 0, result.stderr
    pool = pool_of(result)
    assert pool.resolve("gpt-4o-mini") == "qwen-coder"
    assert pool.models["qwen-coder"].gpu == ("1",)


def test_any_llama_swap_configuration_is_loaded():
    result = run("llama-swap", EXAMPLES / "llama_swap.yaml")
    assert result.exit_code == 0, result.stderr
    assert pool_of(result).models["whisper"].engine_kwargs.served_model == "whisper-1"


def test_litellm_becomes_a_pool():
    result = run("litellm", EXAMPLES / "litellm.yaml")
    written = yaml.safe_load(result.stdout)
    assert written["servers"] == [
        {"url": "http://localhost:11434", "max_concurrent": 1, "server_type": "ollama"},
        {"url": "http://gpu-box:8000", "max_concurrent": 16, "server_type": "vllm", "api_key_env": "GPU_BOX_KEY"},
        {"url": "http://127.0.0.1:1234", "max_concurrent": 1},
    ]
    assert written["models"] == {
        "gpt-4o": {
            "backend": "openai_compatible",
            "remote_base_url": "https://api.openai.com/v1",
            "remote_api_key_env": "OPENAI_API_KEY",
            "remote_model": "gpt-4o",
            "remote_timeout_s": 30,
            "remote_max_retries": 2,
            "price": {"input": 2.5, "output": 10.0},
        },
        "gpt-4o-2": {
            "backend": "openai_compatible",
            "remote_base_url": "https://openrouter.ai/api/v1",
            "remote_api_key_env": "GPT_4O_API_KEY",
            "remote_model": "openai/gpt-4o",
            "remote_max_retries": 2,
        },
        "deep": {
            "backend": "openai_compatible",
            "remote_base_url": "https://api.deepseek.com/v1",
            "remote_api_key_env": "DEEPSEEK_API_KEY",
            "remote_model": "deepseek-chat",
            "remote_max_retries": 2,
            "aliases": ["cheap"],
        },
    }
    assert written["request_timeout_seconds"] == 120
    assert written["admin_keys"][0]["key"].startswith("sha256:")
    assert not [secret for secret in ("sk-in-clear", "sk-master", "u:p@db") if secret in result.output]


def test_what_litellm_loses_is_said_line_by_line():
    found = notes(run("litellm", EXAMPLES / "litellm.yaml"))
    assert "it is called gpt-4o-2" in found["model_list.4.model_name"][1]
    assert found["model_list.1.litellm_params.rpm"][0] == 12
    assert "Qwen/Qwen3-8B" in found["model_list.1.model_name"][1]
    assert "GPT_4O_API_KEY" in found["model_list.4.litellm_params.api_key"][1]
    assert "anthropic has an API of its own" in found["model_list.5.litellm_params.model"][1]
    assert "allow_remote" in found["model_list.6.model_name"][1]
    assert {"litellm_settings.drop_params", "litellm_settings.fallbacks", "router_settings.routing_strategy"} <= set(
        found
    )


def test_a_litellm_configuration_of_servers_is_loaded(tmp_path: Path):
    data = yaml.safe_load((EXAMPLES / "litellm.yaml").read_text())
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model_list": data["model_list"][:3]}))
    result = run("litellm", tmp_path / "config.yaml")
    assert result.exit_code == 0, result.stderr
    assert [server.server_type for server in pool_of(result).servers] == ["ollama", "vllm", None]


def test_any_litellm_configuration_is_loaded():
    result = run("litellm", EXAMPLES / "litellm.yaml")
    assert result.exit_code == 0, result.stderr
    pool = pool_of(result)
    assert pool.resolve("cheap") == "deep"
    assert pool.models["gpt-4o-2"].remote_model == "openai/gpt-4o"


def test_a_modelfile_becomes_a_pool():
    result = run("ollama", EXAMPLES / "coder.Modelfile")
    assert result.exit_code == 0, result.stderr
    assert yaml.safe_load(result.stdout)["models"] == {
        "coder": {
            "model_path": str(EXAMPLES / "coder-7b.gguf"),
            "num_gpus": 1,
            "gguf_n_ctx": 16384,
            "gguf_n_gpu_layers": 20,
            "engine_kwargs": {"n_threads": 4},
            "gguf_lora": [str(EXAMPLES / "lora.gguf")],
        }
    }
    assert pool_of(result).models["coder"].gguf_n_ctx == 16384
    lines = {key: line for key, (line, _) in notes(result).items()}
    assert lines == {
        "PARAMETER temperature": 6,
        "PARAMETER stop": 7,
        "PARAMETER low_vram": 8,
        "TEMPLATE": 9,
        "SYSTEM": 12,
        "MESSAGE": 14,
        "LICENSE": 15,
    }


def test_what_ollama_has_pulled_is_found_in_its_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path))
    manifest = tmp_path / "manifests/registry.ollama.ai/library/llama3.2/latest"
    manifest.parent.mkdir(parents=True)
    manifest.write_text(json.dumps({"layers": [{"mediaType": MODEL_LAYER, "digest": "sha256:ab"}]}))
    modelfile = tmp_path / "Modelfile"
    modelfile.write_text("FROM llama3.2\nPARAMETER num_gpu 0\n")
    result = run("ollama", modelfile)
    assert yaml.safe_load(result.stdout) == {
        "servers": [{"url": "http://127.0.0.1:11434", "server_type": "ollama", "max_concurrent": 1}]
    }
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "sha256-ab").write_text("")
    result = run("ollama", modelfile)
    assert yaml.safe_load(result.stdout)["models"] == {
        "llama3.2": {"model_path": str(tmp_path / "blobs" / "sha256-ab"), "num_gpus": 0}
    }
    assert result.exit_code == 0


@pytest.mark.parametrize(
    ("program", "text", "message"),
    [
        ("llama-swap", "groups: {}", "there are no models in it"),
        ("llama-swap", "models: [", "line 1: not YAML"),
        ("litellm", "a: 1", "there is no model_list in it"),
        ("ollama", "PARAMETER x 1", "a Modelfile has a FROM"),
        ("llama-swap", "models: {a: {cmd: ''}}", "nothing of config could be carried over"),
    ],
)
def test_what_is_no_such_file_is_refused(tmp_path: Path, program: str, text: str, message: str):
    (tmp_path / "config").write_text(text)
    result = run(program, tmp_path / "config")
    assert result.exit_code == 1
    assert message in f"{result.output}{result.exception}"


@pytest.mark.parametrize(
    ("command", "keys"),
    [
        ("-m a.gguf", {"num_gpus": 1, "target_inflight": 1}),
        ("-m a.gguf -fa", {"num_gpus": 1, "target_inflight": 1, "gguf_flash_attn": "on"}),
        ("--model=a.gguf -np 2 -c 0", {"num_gpus": 1, "target_inflight": 2}),
        ("-m a.gguf -ts 1,1 --port 1", {"num_gpus": 2, "target_inflight": 1}),
        ("-m a.gguf -ts 3,1", {"num_gpus": 2, "target_inflight": 1, "gguf_tensor_split": [3.0, 1.0]}),
        ("-m a.gguf -ts 3,0,1", {"num_gpus": 2, "target_inflight": 1}),
        (
            "-m a.gguf --lora x.gguf,y.gguf --lora-scaled z.gguf:0.5",
            {
                "num_gpus": 1,
                "target_inflight": 1,
                "gguf_lora": ["x.gguf", "y.gguf", {"path": "z.gguf", "scale": 0.5}],
            },
        ),
        ("-m a.gguf -dev CUDA0,CUDA2", {"num_gpus": 2, "gpu": ["0", "2"], "target_inflight": 1}),
        ("-m a.gguf --chat-template chatml", {"num_gpus": 1, "target_inflight": 1, "prompt_format": "chatml"}),
        ("-m a.gguf --mlock --alias x,y", {"num_gpus": 1, "target_inflight": 1, "aliases": ["x", "y"]}),
        ("-m a.gguf --seed -1 -b 512", {"num_gpus": 1, "target_inflight": 1, "engine_kwargs": {"n_batch": 512}}),
    ],
)
def test_the_flags_of_llama_server(command: str, keys: dict[str, Any]):
    reading = llama_server.read(["llama-server", *command.split()])
    assert reading.keys == {"model_path": "a.gguf", **keys}


def test_json_has_the_notes():
    shown = json.loads(run("ollama", EXAMPLES / "coder.Modelfile", "--json").stdout)
    assert shown["notes"][0] == {
        "line": 6,
        "key": "PARAMETER temperature",
        "message": "not carried over: clients send it with each request",
    }
