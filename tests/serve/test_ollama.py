"""Ollama's own client over real Serve: chat, generate, embed, lists, and how long models stay."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import ollama
import pytest

from tests.pool import Pool, fake, running_pool, smollm2

HI: Any = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def pool(port: int) -> Iterator[Pool]:
    models = {
        "quick": {**fake(tokens_per_s=1000, tokens=8), "min_replicas": 1},
        "idle": fake(tokens=2),
        "full": {**fake(tokens_per_s=40, tokens=10), "target_inflight": 1, "max_queued": 0, "min_replicas": 1},
        "small": smollm2(target_inflight=2, enabled=True),
    }
    with running_pool(port, {"models": models}) as pool:
        yield pool
        pool.check()


@pytest.fixture(scope="module")
def client(pool: Pool) -> Iterator[ollama.Client]:
    with ollama.Client(host=pool.url) as client:
        yield client


def words(count: int, model: str = "quick") -> str:
    return "".join(f"{model}:{index} " for index in range(count))


def test_chat_and_generate(client: ollama.Client):
    whole = client.chat(model="quick:latest", messages=HI)
    assert (whole.message.content, whole.done) == (words(8), True)
    assert whole.total_duration >= whole.eval_duration > 0
    parts = list(client.chat(model="quick", messages=HI, stream=True, options={"num_predict": 3}))
    assert "".join(part.message.content for part in parts) == words(3)
    assert (parts[-1].done, parts[-1].done_reason, parts[-1].eval_count) == (True, "length", 3)
    assert client.generate(model="quick", prompt="x", raw=True, options={"num_predict": 2}).response == words(2)
    pieces = list(client.generate(model="quick", prompt="x", system="Be brief.", stream=True))
    assert "".join(piece.response for piece in pieces) == words(8)


def test_real_weights_answer_in_a_given_form(client: ollama.Client):
    form = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "maximum": 99}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    answer = client.chat(
        model="small",
        messages=[{"role": "user", "content": "Describe a person."}],
        format=form,
        options={"num_predict": 60, "temperature": 0},
    )
    assert set(json.loads(answer.message.content)) == {"name", "age"}
    assert answer.prompt_eval_count > 5
    assert answer.prompt_eval_duration > 0
    assert answer.eval_duration > 0


def test_embed(client: ollama.Client):
    for model in ("quick", "small"):
        both = client.embed(model=model, input=["one", "two"])
        assert len(both.embeddings) == 2
        old = client.embeddings(model=model, prompt="one").embedding
        assert list(old) == pytest.approx(list(both.embeddings[0]), abs=1e-3)


def test_lists(client: ollama.Client, pool: Pool):
    assert {row.model for row in client.list().models} == {"quick", "idle", "full", "small"}
    client.chat(model="small", messages=HI, options={"num_predict": 1})
    running = {row.model: row for row in client.ps().models}
    assert running["small"].size > 90_000_000
    assert running["small"].context_length == 1024
    assert running["small"].expires_at
    shown = client.show("small:latest")
    assert shown.capabilities == ["completion", "tools"]
    assert (shown.details.family, shown.details.quantization_level) == ("llama", "Q4_1")
    assert shown.modelinfo["general.architecture"] == "llama"
    version = httpx.get(f"{pool.url}/api/version").json()["version"]
    assert tuple(map(int, version.split("."))) >= (0, 14, 0)


def test_errors(client: ollama.Client):
    for call, status in (
        (lambda: client.chat(model="nope", messages=HI), 404),
        (lambda: client.show("nope"), 404),
        (lambda: client.chat(model="quick", messages=HI, options={"temperature": 9}), 400),
        (lambda: client.pull("llama3"), 501),
        (lambda: client.delete("quick"), 501),
        (lambda: client.copy("quick", "other"), 501),
    ):
        with pytest.raises(ollama.ResponseError) as refused:
            call()
        assert refused.value.status_code == status
        assert isinstance(refused.value.error, str)


def test_an_empty_request_loads_and_keep_alive_0_unloads(client: ollama.Client, pool: Pool):
    def is_running() -> bool:
        return "idle" in {row.model for row in client.ps().models}

    assert not is_running()
    assert client.generate(model="idle", keep_alive=0).done_reason == "unload"
    assert client.generate(model="idle").done_reason == "load"
    assert is_running()
    assert client.chat(model="idle", messages=[], keep_alive=0).done_reason == "unload"
    pool.wait(lambda ledger: ledger["models"]["idle"]["ready"] == 0, 10)
    assert client.chat(model="idle", messages=HI, keep_alive="0s").message.content == words(2, "idle")
    pool.wait(lambda ledger: ledger["models"]["idle"]["ready"] == 0, 10)


@pytest.mark.timeout(60)
def test_llama_servers_router_calls_load_and_unload(pool: Pool):
    def value(http: httpx.Client) -> str:
        (status,) = (row["status"]["value"] for row in http.get("/models").json()["data"] if row["id"] == "idle")
        return str(status)

    with pool.http() as http, pool.http() as follower:
        assert value(http) == "unloaded"
        with follower.stream("GET", "/models/sse") as events:
            lines = events.iter_lines()
            assert next(lines).startswith(":")
            assert http.post("/models/load", json={"model": "idle"}).json() == {"success": True}
            told = (json.loads(line[6:]) for line in lines if line.startswith("data: "))
            states = (event["data"]["status"] for event in told if event["event"] == "model_status")
            assert next(state for state in states if state == "loaded")
        assert value(http) == "loaded"
        assert http.post("/models/unload", json={"model": "idle"}).json() == {"success": True}
        assert value(http) == "unloaded"
        unknown = http.post("/models/load", json={"model": "nope"})
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "MODEL_NOT_FOUND")


def test_a_full_queue_sends_nobody_away(client: ollama.Client):
    with ThreadPoolExecutor() as threads:
        answers = list(threads.map(lambda _: client.chat(model="full", messages=HI), range(3)))
    assert [answer.message.content for answer in answers] == [words(10, "full")] * 3
