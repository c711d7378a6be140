"""`slotpool doctor`: what is there, and what to type for what is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from app.cli import engine_checks
from app.cli.commands import doctor
from cluster.config import ModelConfig
from tests.unit.cli.scripted_pool import ScriptedPool


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, str]]:
    pool = ScriptedPool()
    pool.on("GET /health", {"status": "healthy", "version": "9"})
    result = pool.run("doctor", "--json")
    assert result.exit_code == 0
    return {row["what"]: row for row in json.loads(result.output)}


def test_this_machine_can_run_a_pool(rows: dict[str, dict[str, str]]):
    assert {rows[name]["level"] for name in ("slotpool", "python", "ray", "llama_cpp", "disk")} == {"ok"}
    assert " on CPU" in rows["llama_cpp"]["found"] or " on GPU" in rows["llama_cpp"]["found"]
    assert rows["pool"]["found"] == "answers at http://127.0.0.1:8000, version 9"


def test_an_engine_that_is_not_there_says_what_to_type(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(ModelConfig.backends, "vllm", ModelConfig)
    monkeypatch.setattr(engine_checks, "_import", lambda python, engine: None)
    found = {each.backend: each for each in engine_checks.engine_checks(tmp_path)}
    assert not found["vllm"].is_there
    assert "make serve ENGINES=vllm" in found["vllm"].advice
    row = doctor._engine(found["vllm"])
    assert (row.level, row.found) == (doctor.NOTE, "not installed")


def test_an_engine_in_an_environment_of_its_own_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    python = tmp_path / ".venv-vllm" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("")
    monkeypatch.setitem(ModelConfig.backends, "vllm", ModelConfig)
    monkeypatch.setattr(engine_checks, "_import", lambda exe, engine: ("0.32.0", "cpu") if exe == str(python) else None)
    found = {each.backend: each for each in engine_checks.engine_checks(tmp_path)}["vllm"]
    assert (found.version, found.python) == ("0.32.0", str(python))
    assert found.advice == f"models of it need python: {python}"


def test_without_an_engine_nothing_can_be_served(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engine_checks, "_import", lambda python, engine: None)
    result = ScriptedPool().run("doctor", "--json", "--url", "http://elsewhere:1")
    assert result.exit_code == 1
    rows = {row["what"]: row for row in json.loads(result.output.partition("\nError:")[0])}
    assert rows["engines"]["level"] == "missing"
