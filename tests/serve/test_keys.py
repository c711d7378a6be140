"""Keys and strangers over real Serve: what is refused, and that a key in clear is nowhere but in its file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from tests.pool import Pool, fake, running_pool

TEAM, ADMIN = "clear-team-key-5b1d", "clear-admin-key-77e0"
CHAT = {"model": "one", "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture(scope="module")
def pool(port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    file = tmp_path_factory.mktemp("keys") / "pool.yaml"
    keys = {"api_keys": [{"name": "team", "key": TEAM, "models": ["one"]}], "admin_keys": [ADMIN]}
    file.write_text(yaml.safe_dump({"models": {"one": fake(tokens=2), "two": fake(tokens=2)}, **keys}))
    with running_pool(port, {"config": str(file)}) as pool:
        yield pool


@pytest.fixture(scope="module")
def open_pool(port: int) -> Iterator[Pool]:
    with running_pool(port, {"models": {"one": fake(tokens=2)}}) as pool:
        yield pool
        pool.check()


def ask(pool: Pool, key: str | None, model: str = "one") -> httpx.Response:
    headers = {"X-Request-Id": "mine", **({} if key is None else {"Authorization": f"Bearer {key}"})}
    return httpx.post(f"{pool.url}/v1/chat/completions", json={**CHAT, "model": model}, headers=headers, timeout=60)


def test_who_may_use_what(pool: Pool):
    answers = {
        (key, model): ask(pool, key, model).status_code for key in (None, "x", TEAM, ADMIN) for model in ("one", "two")
    }
    assert {each for each, status in answers.items() if status == 200} == {
        (TEAM, "one"),
        (ADMIN, "one"),
        (ADMIN, "two"),
    }
    assert answers[TEAM, "two"] == 403
    assert answers[None, "one"] == answers["x", "one"] == 401
    for answer in (ask(pool, TEAM), ask(pool, None), ask(pool, TEAM, "two")):
        assert answer.headers.get_list("x-request-id") == ["mine"]
    with pool.http() as http:
        listed = http.get("/v1/models", headers={"X-Api-Key": TEAM}).json()
        assert [row["id"] for row in listed["data"]] == ["one"]
        assert http.get("/v1/admin/models", headers={"X-Api-Key": TEAM}).json()["detail"]["code"] == "forbidden"
        unknown = http.get("/v1/admin/nothing", headers={"X-Api-Key": ADMIN})
        assert (unknown.status_code, unknown.json()["detail"]["code"]) == (404, "not_found")
        assert unknown.headers["x-request-id"]


def test_no_key_in_clear_leaves_its_file(pool: Pool):
    import ray
    from ray.serve._private import api

    client = api.serve_start()
    places = {"Serve's REST API": json.dumps(client.get_serve_details(), default=str).encode()}
    for name, (info, _) in ray.get(client._controller.list_deployments_internal.remote()).items():
        replica = info.replica_config
        places[f"the arguments of {name}"] = replica.serialized_init_args + replica.serialized_init_kwargs
    with pool.http() as http:
        for path in ("/v1/status", "/v1/models", "/v1/admin/models", "/admin/stats", "/metrics", "/openapi.json"):
            places[path] = http.get(path, headers={"X-Api-Key": ADMIN}).content
    for log in Path(ray._private.worker._global_node.get_logs_dir_path()).rglob("*"):
        if log.is_file():
            places[f"the log {log.name}"] = log.read_bytes()
    assert len(places) > 10
    assert [place for place, text in places.items() if TEAM.encode() in text or ADMIN.encode() in text] == []


def test_without_keys_strangers_are_refused(open_pool: Pool):
    own = open_pool.url
    with open_pool.http() as http:
        for origin, status in ((None, 200), (own, 200), ("http://evil.example", 403), ("null", 403)):
            headers = {} if origin is None else {"Origin": origin}
            # A page can send this without asking: it needs no preflight.
            answer = http.post(
                "/v1/chat/completions", content=json.dumps(CHAT), headers={"Content-Type": "text/plain", **headers}
            )
            assert answer.status_code == status
        assert http.post("/v1/admin/models/one/unload", headers={"Origin": "http://evil.example"}).status_code == 403
        assert http.get("/v1/status", headers={"Host": "evil.example"}).status_code == 403
        assert http.get("/v1/status", headers={"Host": "localhost:1"}).status_code == 200
    assert open_pool.ledger()["models"]["one"]["ready"] == 1
