"""The operators' rows and the shape of their errors, without a pool."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from app.answers import error_response
from app.routes.admin import LoadOptions
from app.routes.admin_rows import admin_row, gpu_row, short_row
from app.routes.service import _is_missed
from cluster import errors
from cluster.config import load_config
from cluster.gpus import Gpu
from cluster.ledger.ledger import Ledger
from cluster.ledger.snapshot import ModelRow
from tests.unit.scripted import Scripted


def test_errors_of_the_admin_families_carry_detail():
    error = errors.ModelNotLoaded("the model 'm' is loaded by an operator only")
    plain = error_response(error, path="/v1/chat/completions", model="m")
    assert plain.status_code == 503
    assert plain.headers["retry-after"] == "1"
    assert "detail" not in json.loads(plain.body)
    for path in ("/v1/admin/models/m/x", "/llm-pool/v1/responses", "/admin/models/m/x"):
        detailed = error_response(error, path=path, model="m")
        body = json.loads(detailed.body)
        assert detailed.status_code == 409
        assert "retry-after" not in detailed.headers
        assert body["error"]["code"] == "model_not_loaded"
        assert body["detail"] == {"code": "model_not_loaded", "model": "m", "message": error.message}


async def test_an_id_that_stands_in_the_body_stands_in_detail():
    async with Scripted().http() as http:
        answer = await http.post("/admin/models/unload", json={"id": "zzz"})
    assert answer.status_code == 404
    assert answer.json()["error"]["install_endpoint"] == "/v1/models/install"
    assert (answer.json()["detail"]["code"], answer.json()["detail"]["model"]) == ("unknown_model", "zzz")


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (errors.ModelNotFound("x"), 404, "unknown_model"),
        (errors.ModelUnavailable("x"), 409, "model_failed"),
        (errors.ModelUnavailable("x", code="model_load_failed", status=500), 500, "model_load_failed"),
        (errors.ModelUnavailable("x", code="model_unloading", status=409), 409, "model_unloading"),
        (errors.QueueFull("x"), 429, "executor_queue_full"),
        (errors.InvalidRequest("x", code="invalid_load_request"), 400, "invalid_load_request"),
        (errors.BackendUnavailable("x"), 503, "backend_unavailable"),
    ],
)
def test_the_words_of_detail(error, status, code):
    answer = error_response(error, path="/v1/admin/models/m/load")
    assert (answer.status_code, json.loads(answer.body)["detail"]["code"]) == (status, code)


def test_an_explicit_null_is_an_override():
    assert LoadOptions.model_validate({"gguf_type_k": None, "replicas": 2}).overrides() == {"gguf_type_k": None}
    assert LoadOptions.model_validate({}).overrides() == {}
    for bad in ({"exllama_cache_size": 300}, {"gguf_n_ctx": 0}, {"replicas": 0}, {"replicas": "2"}, {"x": 1}):
        with pytest.raises(ValueError, match="validation error"):
            LoadOptions.model_validate(bad)


def test_rows_tell_where_an_estimate_comes_from():
    config = load_config({"models": {"m": {"backend": "fake", "target_inflight": 3}}}, environ={})
    snapshot = replace(Ledger(config.spec(), epoch="e", now=0.0).snapshot(), now=9.0)
    row = admin_row(config, "m", snapshot)
    assert (row["vram_estimate_mib"], row["vram_estimate_source"]) == (None, "unavailable")
    assert (row["runtime_state"], row["is_loaded"], row["effective_target_inflight"]) == ("unloaded", False, 3)
    row = admin_row(config.with_estimates({"m": 50}), "m", snapshot)
    assert (row["vram_estimate_mib"], row["vram_estimate_source"]) == (50, "model_artifact_size")
    loaded = ModelRow(memory_mib=60, state="loaded", ready=2, last_arrival=2.0)
    snapshot = replace(snapshot, models={"m": loaded})
    row = admin_row(config.with_estimates({"m": 50}), "m", snapshot)
    assert (row["vram_estimate_mib"], row["vram_estimate_source"]) == (60, "observed_load_delta")
    assert row["definition"]["backend"] == "fake"
    short = short_row(config, "m", snapshot)
    assert short == {"id": "m", "status": "ready", "mem_bytes": 120 << 20, "last_used_secs_ago": 7, "inflight": 0}


def test_ready_misses_only_what_never_came_or_has_failed():
    def row(state: str, load_s: float | None) -> ModelRow:
        return ModelRow(state=state, load_s=load_s)

    assert [_is_missed(each) for each in (None, row("unloaded", None), row("failed", 1.0))] == [True] * 3
    assert [_is_missed(each) for each in (row("loaded", None), row("unloaded", 1.0))] == [False] * 2


def test_a_gpus_row():
    row = gpu_row("node", Gpu(0, "GPU-1", "RTX", 75603, 97887))
    assert row["used_over_total"] == "75603MiB / 97887MiB"
    assert SimpleNamespace(**row).index == 0
