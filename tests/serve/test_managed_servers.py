"""Servers that the pool starts, and remote APIs, over real Serve: rows, raw paths, deaths, budgets."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from deployments.host_memory import tree_of
from tests.pool import SMOLLM2, Pool, loaded, running_pool
from tests.unit.raylet import lives, wait_until
from tests.upstream import Upstream

COMMANDS = Path(__file__).parents[1] / "commands"
SCRIPTED = (sys.executable, str(COMMANDS / "scripted_server.py"), "--port", "${PORT}")


def native() -> dict[str, Any]:
    script = str(COMMANDS / "native_server.py")
    options = ["--port", "${PORT}", "--model", "${MODEL_PATH}", "--parallel", "2", "--threads", "1"]
    command = [sys.executable, script, *options]
    return {"backend": "server", "model_path": SMOLLM2, "target_inflight": 2, "engine_kwargs": {"command": command}}


@pytest.fixture(scope="module")
def far() -> Iterator[Upstream]:
    with Upstream("big").listening() as upstream:
        yield upstream


@pytest.fixture(scope="module")
def pool(port: int, far: Upstream) -> Iterator[Pool]:
    remote = {"backend": "openai_compatible", "remote_base_url": far.url, "remote_model": "big"}
    models = {
        "native": native(),
        "scripted": {"backend": "server", "engine_kwargs": {"command": [*SCRIPTED, "--tokens", "200"]}},
        "wrong": {"backend": "sglang", "model_path": "/models/x.gguf"},
        "far": {**remote, "remote_budget": {"requests": 3}},
        "keyless": {**remote, "remote_api_key_env": "NO_SUCH_KEY"},
    }
    with running_pool(port, {"models": models}) as pool:
        yield pool
        pool.check()


def ask(model: str, **fields: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": "What is gravity?"}], "max_tokens": 8, **fields}


def backend(pool: Pool, model: str) -> dict[str, Any]:
    with pool.http() as http:
        found: dict[str, Any] = http.get("/v1/status").json()["backends"][model]
    return found


def test_real_weights_in_a_server_of_their_own(pool: Pool):
    pytest.importorskip("xllamacpp")
    client = pool.openai()
    assert backend(pool, "native")["url"] is None
    answer = client.chat.completions.create(**ask("native", temperature=0))
    assert answer.model == "native"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8
    assert answer.model_extra is not None
    assert answer.model_extra["metrics"]["engine_output_tokens"] == 8
    chunks = list(client.chat.completions.create(**ask("native", temperature=0), stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer.choices[0].message.content
    assert chunks[-1].model_extra["metrics"]["engine_prompt_tokens"] == answer.usage.prompt_tokens
    row = backend(pool, "native")
    assert (row["is_running"], row["is_healthy"], row["error"]) == (True, True, None)
    assert row["url"].startswith("http://127.0.0.1:")
    assert "native_server.py" in Path("/proc", str(row["pid"]), "cmdline").read_text()
    with pool.http() as http:
        raw = http.get("/props", params={"model": "native"})
        assert raw.json()["total_slots"] == 2, "a path that only llama.cpp's server has"
        tree = list(tree_of(row["pid"]))
        assert http.post("/v1/admin/models/native/unload").status_code == 200
    assert not any(map(lives, tree))
    assert backend(pool, "native")["pid"] is None


def test_a_server_that_dies_in_mid_stream_is_replaced(pool: Pool):
    client = pool.openai()
    said = ""
    with pytest.raises(openai.APIError):
        for chunk in client.chat.completions.create(**ask("scripted"), stream=True):
            said += chunk.choices[0].delta.content or ""
            if said == "0 1 ":
                os.kill(backend(pool, "scripted")["pid"], signal.SIGKILL)
    assert said.startswith("0 1 ")
    assert client.chat.completions.create(**ask("scripted")).choices[0].message.content
    pool.wait(lambda ledger: ledger["leases"] == 0)


def test_load_answer_unload_twenty_times(pool: Pool):
    with pool.http() as http:
        http.post("/v1/admin/models/scripted/load").raise_for_status()
        replica = loaded(pool.ledger(), "scripted")[0]
        host = parent_of(replica["pid"])
        nursery = parent_of(host)
        http.post("/v1/admin/models/scripted/unload").raise_for_status()
        before = len(list(tree_of(nursery))), len(os.listdir(f"/proc/{nursery}/fd"))
        for _ in range(20):
            assert http.post("/v1/chat/completions", json=ask("scripted")).status_code == 200
            http.post("/v1/admin/models/scripted/unload").raise_for_status()
        wait_until(lambda: (len(list(tree_of(nursery))), len(os.listdir(f"/proc/{nursery}/fd"))) == before)


def parent_of(pid: int) -> int:
    return int(Path("/proc", str(pid), "stat").read_text().rsplit(") ", 1)[1].split()[1])


def test_a_format_that_the_backend_does_not_read_is_refused_and_nothing_is_loaded(pool: Pool):
    with pool.http() as http:
        answer = http.post("/v1/chat/completions", json=ask("wrong"))
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "FORMAT_NOT_SUPPORTED")
    assert error["preferred_formats"] == ["hf", "awq"]
    assert not loaded(pool.ledger(), "wrong")


def test_a_remote_model_needs_leave_a_key_and_a_budget(pool: Pool, far: Upstream):
    with pool.http() as http:
        submitted = pool.ledger()["submitted"]
        refused = http.post("/v1/chat/completions", json=ask("far"))
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "remote_execution_disallowed")
        flat = http.post("/llm-pool/v1/responses", json={"model": "far", "input": "x"})
        assert (flat.status_code, flat.json()["detail"]["code"]) == (403, "remote_execution_disallowed")
        assert pool.ledger()["submitted"] == submitted, "it was never in the queue"
        assert not far.bodies
        answer = http.post("/v1/chat/completions", json=ask("far", allow_remote=True)).json()
        assert (answer["model"], far.bodies[0]["model"]) == ("far", "big")
        assert answer["metrics"]["pool_total_wall_ms"] > 0
        streamed = pool.openai().chat.completions.create(**ask("far"), stream=True, extra_body={"allow_remote": True})
        assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed).startswith("big:0 ")
        flat = http.post("/llm-pool/v1/responses", json={"model": "far", "input": "x", "allow_remote": True})
        assert flat.json()["output_text"].startswith("big:0 ")
        over = http.post("/v1/chat/completions", json=ask("far", allow_remote=True))
        assert (over.status_code, over.json()["error"]["code"]) == (402, "remote_budget_exceeded")
        assert len(far.bodies) == 3
        unset = http.post("/v1/chat/completions", json=ask("keyless", allow_remote=True))
        assert (unset.status_code, unset.json()["error"]["code"]) == (500, "missing_api_key_env")
        row = next(row for row in http.get("/v1/models").json()["data"] if row["id"] == "far")
        assert (row["execution_mode"], row["backend"], row["capabilities"]) == ("remote", "openai_compatible", ["chat"])
    assert backend(pool, "far")["url"] == far.url
