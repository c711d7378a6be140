"""What `slotpool serve` serves where no file says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.cli.document import document_of
from app.cli.found import free_id, id_of
from cluster.config import ConfigError, load_config, read_yaml

ROOT = Path(__file__).parents[3]


def test_the_built_in_pool_is_that_of_the_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    assert document_of(None, None) == read_yaml(ROOT / "serve_config.yaml")


def test_without_the_built_in_model_there_is_nothing_to_serve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("app.cli.document.BUILT_IN_PACKAGE", "no_such_package")
    with pytest.raises(ConfigError, match=r"nothing to serve: .* slotpool serve FOLDER"):
        document_of(None, None)
    (tmp_path / "pool.yaml").write_text("models: {a: {backend: fake}}")
    document = document_of(None, None, tmp_path / "pool.yaml")
    assert document["applications"][0]["args"] == {"config": str(tmp_path / "pool.yaml")}


def test_a_file_in_the_working_folder_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "serve_config.yaml").write_text("applications: []")
    monkeypatch.chdir(tmp_path)
    assert document_of(None, None) == {"applications": []}


def test_a_folder_is_a_pool_of_its_files(tmp_path: Path):
    (tmp_path / "below").mkdir()
    for name in (
        "Qwen3 8B.Q4_K_M.gguf",
        "below/qwen3-8b.Q4_K_M.gguf",
        "big-00001-of-00002.gguf",
        "big-00002-of-00002.gguf",
        "mmproj-qwen.gguf",
        "notes.txt",
    ):
        (tmp_path / name).write_text("")
    args = document_of(tmp_path, 1)["applications"][0]["args"]
    pool = load_config(args, {})
    assert {name: Path(model.model_path or "").name for name, model in pool.models.items()} == {
        "qwen3-8b.q4_k_m": "Qwen3 8B.Q4_K_M.gguf",
        "qwen3-8b.q4_k_m-2": "qwen3-8b.Q4_K_M.gguf",
        "big": "big-00001-of-00002.gguf",
    }
    assert {model.num_gpus for model in pool.models.values()} == {1}
    on_cpu = load_config(document_of(tmp_path, 0)["applications"][0]["args"], {})
    assert {model.num_gpus for model in on_cpu.models.values()} == {0}


def test_an_empty_folder_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="there is no GGUF file"):
        document_of(tmp_path, 0)


def test_a_pools_own_configuration_is_served_as_it_is(tmp_path: Path):
    file = tmp_path / "pool.yaml"
    file.write_text("models: {a: {backend: fake}}")
    assert document_of(file, None)["applications"][0]["args"] == {"config": str(file)}
    with pytest.raises(ConfigError, match=r"^none.yaml: No such file"):
        document_of(tmp_path / "none.yaml", None)


def test_one_file_is_a_pool_of_one(tmp_path: Path):
    file = tmp_path / "a.gguf"
    file.write_text("")
    assert document_of(file, 0)["applications"][0]["args"] == {
        "models": {"a": {"model_path": str(file), "num_gpus": 0}}
    }


def test_ids_of_files():
    assert id_of(Path("SmolLM2-135M-Instruct.Q4_1.gguf")) == "smollm2-135m-instruct.q4_1"
    assert id_of(Path("….gguf")) == "model"
    assert free_id("a", {"a": 1, "a-2": 1}) == "a-3"
