"""Paths that go through to an engine, and what else an engine serves beside chat, over real Serve."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import httpx
import pytest

from tests.pool import Pool, fake, running_pool
from tests.upstream import Upstream

MODELS = {"words": {**fake(tokens=3), "aliases": ["w"]}}


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    with Upstream("far").listening() as upstream:
        yield upstream


@pytest.fixture(scope="module")
def pool(port: int, upstream: Upstream) -> Iterator[Pool]:
    servers = [{"url": upstream.url, "server_type": "vllm"}]
    with running_pool(port, {"models": MODELS, "servers": servers}) as pool:
        pool.wait(lambda ledger: all(server["is_up"] for server in ledger["servers"]))
        yield pool
        pool.check()


def test_what_an_engine_has_beside_its_routes_is_reached(pool: Pool):
    with pool.http() as http:
        seen = http.get("/fake/environment", params={"model": "w"})
        assert seen.status_code == 200
        assert seen.json()["pid"]
        raw = bytes(range(256)) * 4000
        kind = {"content-type": "application/x-raw"}
        echoed = http.post("/fake/echo?model=words", content=raw, headers=kind)
        assert (echoed.content, echoed.headers["content-type"]) == (raw, "application/x-raw")
        body = b'{"model": "words", "untouched":  [1,   2]}'
        assert http.post("/fake/echo", content=body, headers={"content-type": "application/json"}).content == body
        form = http.post("/fake/echo", data={"model": "words"}, files={"file": ("a.wav", b"RIFF", "audio/wav")})
        assert b"RIFF" in form.content
        assert form.headers["content-type"].startswith("multipart/form-data; boundary=")


def test_a_servers_answer_comes_back_as_it_is_and_as_it_comes(pool: Pool, upstream: Upstream):
    upstream.release.clear()
    headers = {"authorization": "Bearer secret", "cookie": "a=b", "x-own": "1", "content-type": "text/x"}
    with (
        pool.http() as http,
        http.stream("PUT", "/echo/this?model=far&x=%20y", content=b"\x00body", headers=headers) as answer,
    ):
        assert answer.status_code == 418
        parts = answer.iter_raw()
        assert next(parts) == b"\x00"
        assert pool.ledger()["leases"] == 1
        upstream.release.set()
        assert b"".join(parts) == b"body"
    seen = {name: value for name, value in answer.headers.items() if name.startswith("x-seen-")}
    assert (seen["x-seen-method"], seen["x-seen-path"], seen["x-seen-query"]) == (
        "PUT",
        "/echo/this",
        "model=far&x=%20y",
    )
    assert (seen["x-seen-header-x-own"], seen["x-seen-header-content-type"]) == ("1", "text/x")
    assert not {"x-seen-header-authorization", "x-seen-header-cookie"} & set(seen)
    assert answer.headers["content-type"] == "image/x"


def test_rerank_score_and_audio_go_to_engines_that_have_them(pool: Pool):
    with pool.http() as http:
        ranked = http.post("/v1/rerank", json={"model": "far", "query": "x", "documents": ["a", "ccc", "bb"]}).json()
        assert [each["index"] for each in ranked["results"]] == [1, 2, 0]
        scored = http.post("/v1/score", json={"model": "far", "text_1": "x", "text_2": ["a", "bb"]}).json()
        assert [each["score"] for each in scored["data"]] == [1.0, 2.0]
        spoken = http.post("/v1/audio/speech", json={"model": "far", "input": "hi", "voice": "any"})
        assert (spoken.content, spoken.headers["content-type"]) == (b"RIFF\x00\xffhi", "audio/wav")
    heard = pool.openai().audio.transcriptions.create(model="far", file=("a.wav", b"RIFF" * 1000))
    assert int(heard.text.split()[0]) > 4000


@pytest.mark.parametrize("path", ["/v1/rerank", "/v1/score", "/v1/audio/speech"])
def test_an_engine_that_has_none_of_them_says_so(pool: Pool, path: str):
    with pool.http() as http:
        answer = http.post(path, json={"model": "words", "input": "x", "query": "x", "documents": ["x"]})
    assert answer.status_code in (400, 404)
    assert "does not serve" in answer.json()["error"]["message"]


def test_a_client_that_leaves_frees_its_slot(pool: Pool, upstream: Upstream):
    upstream.release.clear()
    with pool.http() as http, http.stream("POST", "/echo?model=far", content=b"ab") as answer:
        next(answer.iter_raw())
    pool.wait(lambda ledger: ledger["leases"] == 0)
    upstream.release.set()


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing-here", 400, "MODEL_REQUIRED"),
        ("GET", "/nothing-here?model=nobody", 404, "MODEL_NOT_FOUND"),
        ("GET", "/v1/chat/completions", 405, "METHOD_NOT_ALLOWED"),
        ("GET", "/admin/nothing-here?model=words", 404, "NOT_FOUND"),
        ("POST", "/v1/rerank?model=words", 400, "INVALID_REQUEST"),
    ],
)
def test_what_leads_nowhere_says_so(pool: Pool, method: str, path: str, status: int, code: str):
    with pool.http() as http:
        answer = http.request(method, path)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


def test_a_foreign_page_reaches_no_engine_by_any_method(pool: Pool):
    with pool.http() as http:
        for headers in ({"sec-fetch-site": "cross-site"}, {"origin": "http://evil.example"}):
            answer = http.get("/fake/environment?model=words", headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "FORBIDDEN")
        assert http.get("/fake/environment?model=words", headers={"sec-fetch-site": "none"}).status_code == 200


def test_embeddings_and_tokens(pool: Pool):
    found = pool.openai().embeddings.create(model="w", input=["one two", "three"])
    assert [row.index for row in found.data] == [0, 1]
    assert len(found.data[0].embedding) == 8
    assert (found.model, found.usage.prompt_tokens) == ("w", 3)
    with pool.http() as http:
        floats = http.post("/v1/embeddings", json={"model": "w", "input": "three", "encoding_format": "float"}).json()
        assert floats["data"][0]["embedding"] == pytest.approx(found.data[1].embedding, rel=1e-6)
        counted = http.post("/tokenize", json={"model": "words", "content": "one two"}).json()
        assert counted["count"] == 2
        back = http.post("/detokenize", json={"model": "words", "tokens": counted["tokens"]})
        assert back.status_code == 200
        for path, wrong, param in (
            ("/v1/embeddings", {"input": ""}, "input"),
            ("/v1/embeddings", {"input": "a", "encoding_format": "hex"}, "encoding_format"),
            ("/tokenize", {}, None),
            ("/detokenize", {"tokens": [-1]}, "tokens.0"),
        ):
            refused = http.post(path, json={"model": "words", **wrong})
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, param), refused.text


def test_the_interactive_page_needs_nobody_else(pool: Pool):
    with pool.http() as http:
        page = http.get("/docs").text
        linked = re.findall(r'(?:src|href)="([^"]+)"', page)
        assert linked
        for link in linked:
            assert link.startswith("/"), link
            assert http.get(link).status_code == 200, link
        assert "/v1/embeddings" in http.get("/openapi.json").json()["paths"]


def test_a_wrong_form_is_refused(pool: Pool):
    wrong = {"content-type": "multipart/form-data"}
    answer = httpx.post(f"{pool.url}/v1/audio/transcriptions", content=b"no form", headers=wrong)
    assert (answer.status_code, json.loads(answer.content)["error"]["code"]) == (400, "INVALID_REQUEST")
