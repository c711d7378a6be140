"""What the command line refuses before it starts anything."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from app.cli.checks import ray_folder, refuse_full_disk
from app.cli.serve import start_ray
from cluster.config import ConfigError

Usage = namedtuple("Usage", "total used free")


def test_a_full_disk_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(2**40, 2**40 - 2**20, 2**20))
    with pytest.raises(ConfigError, match=r"no space left for Ray in .*: 1 MiB are free and 100 are needed"):
        refuse_full_disk()


def test_rays_folder_is_the_one_that_ray_takes(monkeypatch: pytest.MonkeyPatch):
    from ray._common.utils import get_default_system_temp_dir

    for environment in ({}, {"TMPDIR": "/a"}, {"TMPDIR": "/a", "RAY_TMPDIR": "/b"}):
        monkeypatch.delenv("TMPDIR", raising=False)
        monkeypatch.delenv("RAY_TMPDIR", raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert ray_folder() == get_default_system_temp_dir()


def test_a_ray_that_does_not_start_says_why_in_one_line(monkeypatch: pytest.MonkeyPatch):
    import ray

    def init(**options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ConfigError, match=r"^Ray did not start: \[Errno 28\] No space left on device$"):
        start_ray(0)


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[2]
    return subprocess.run(["make", *arguments], cwd=root, capture_output=True, text=True, check=False)


def test_cuda_without_its_compiler_is_one_line_before_anything_is_compiled():
    result = make("cuda-compiler", "NVCC=no-such-compiler")
    assert result.returncode
    lines = [line for line in result.stderr.splitlines() if line.startswith("slotpool:")]
    assert len(lines) == 1
    assert "no-such-compiler" in lines[0]


def test_cuda_is_passed_on_to_the_build_of_llama_cpp():
    plan = make("--dry-run", "--always-make", "serve", "CUDA=1").stdout
    assert '-DGGML_CUDA=on" .venv/bin/python -m pip' in plan
    assert "-DGGML_CUDA" not in make("--dry-run", "--always-make", "serve").stdout


@pytest.mark.parametrize(("variable", "kind"), [("CXX", "C++"), ("CC", "C")])
def test_a_missing_compiler_is_one_line_before_anything_is_compiled(variable: str, kind: str):
    result = make("compiler", f"PYTHON={sys.executable}", f"{variable}=no-such-compiler")
    assert result.returncode
    lines = [line for line in result.stderr.splitlines() if line.startswith("slotpool:")]
    assert len(lines) == 1
    assert lines[0].startswith(f"slotpool: no {kind} compiler (no-such-compiler), which llama.cpp needs: install g")
