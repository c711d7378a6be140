"""Bad input in every family, over real HTTP: never a 5xx, a traceback or a lost lease, and the pool still answers.

The bodies are made from good ones, field by field, from a seed; a body that turns out to be good may be answered.
"""

from __future__ import annotations

import asyncio
import copy
import json
import random
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.pool import Pool, fake, running_pool

SEED = 11
MODELS = {"m": {**fake(tokens=2, tokens_per_s=100_000), "target_inflight": 64}}

CHAT = {
    "model": "m",
    "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}],
    "stream": False,
    "temperature": 0.5,
    "top_p": 0.9,
    "n": 1,
    "stop": ["x"],
    "seed": 1,
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    "tool_choice": "auto",
    "response_format": {"type": "text"},
    "stream_options": {"include_usage": True},
    "priority": "high",
    "keep_alive": 10,
    "timeout_s": 20,
    "logit_bias": {"1": 1},
}
FAMILIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"model": "m", "prompt": ["a", "b"], "max_tokens": 2, "echo": False, "logprobs": 1},
    "/v1/embeddings": {"model": "m", "input": ["a", "b"], "encoding_format": "float"},
    "/tokenize": {"model": "m", "content": "a b", "add_special": True},
    "/detokenize": {"model": "m", "tokens": [1, 2]},
    "/v1/messages": {
        "model": "m",
        "max_tokens": 2,
        "system": [{"type": "text", "text": "s"}],
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
        "tools": [{"name": "f", "input_schema": {"type": "object"}}],
        "tool_choice": {"type": "auto"},
        "stop_sequences": ["x"],
    },
    "/v1/messages/count_tokens": {"model": "m", "messages": [{"role": "user", "content": "hi"}]},
    "/api/chat": {
        "model": "m",
        "messages": [{"role": "user", "content": "hi", "images": []}],
        "stream": False,
        "options": {"num_predict": 2, "temperature": 0.1, "stop": ["x"]},
        "keep_alive": "5m",
        "format": "json",
    },
    "/api/generate": {"model": "m", "prompt": "hi", "stream": False, "system": "s", "options": {"num_predict": 2}},
    "/api/embed": {"model": "m", "input": ["a", "b"]},
    "/api/show": {"model": "m"},
    "/v1/responses": {
        "model": "m",
        "input": [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]}],
        "instructions": "s",
        "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}}],
        "text": {"format": {"type": "text"}},
        "store": False,
        "metadata": {"a": "b"},
        "decoding": {"max_tokens": 2, "beam_size": 1},
    },
    "/llm-pool/v1/responses": {"model": "m", "input": "hi", "decoding": {"max_tokens": 2}},
    "/api/v1/inference": {"model_id": "m", "prompt": "hi", "priority": "low", "request_id": "r"},
    "/v1/models/validate": {"model": "m", "messages": [{"role": "user", "content": "hi"}]},
    "/v1/admin/models/m/load": {"replicas": 1},
    "/admin/models/load": {"id": "m"},
}
#: What makes an answer as long as it says: no mistake, but nothing to wait for either.
LENGTHS = {"max_tokens", "max_completion_tokens", "num_predict", "n", "best_of", "timeout_s"}

DEEP: Any = 1
for _ in range(200):
    DEEP = [DEEP]
VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1.5,
    10**30,
    -(10**30),
    1e308,
    "",
    "x" * 100_000,
    "\u0000",
    "\ud800",
    "🦙" * 50,
    "‮ ​\u2028",
    [],
    [[]],
    [None],
    {},
    {"": None},
    {"type": "nope"},
    {"type": []},
    DEEP,
    float("nan"),
    float("inf"),
)


def spots(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something may be put in the place of something, everywhere in a body."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from spots(inner, (*path, key))


def put(body: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(body)
    where: Any = changed
    for key in path[:-1]:
        where = where[key]
    where[path[-1]] = value
    return changed


def bodies() -> Iterator[tuple[str, bytes]]:
    rng = random.Random(SEED)
    for route, good in FAMILIES.items():
        text = json.dumps(good).encode()
        yield route, b""
        yield route, b"null"
        yield route, b"[]"
        yield route, b'"text"'
        yield route, b"\xff\xfe\x00"
        yield route, text[: len(text) // 2]
        yield route, text + b"}"
        yield route, b"[" * 100_000
        yield route, b'{"model": "m", ' + text[1:]
        yield route, text.replace(b'"m"', b'"\xc3\x28"', 1)
        places = list(spots(good))
        for _ in range(24):
            place = rng.choice(places)
            value = rng.choice(VALUES)
            if place[-1] in LENGTHS and isinstance(value, int | float) and value > 100:
                value = "many"
            yield route, json.dumps(put(good, place, value)).encode()
        yield route, json.dumps({**good, "unknown": DEEP, "model": good.get("model", "m")}).encode()


HEADERS: tuple[dict[str, str], ...] = (
    {"content-type": "text/plain"},
    {"content-type": "application/json; charset=utf-16"},
    {"content-type": "multipart/form-data"},
    {"x-priority": "soon"},
    {"x-request-timeout": "nan"},
    {"x-request-timeout": "-1"},
    {"x-request-id": "x" * 9000},
    {"x-request-id": "a\tb"},
    {"authorization": "Bearer " + "x" * 9000},
    {"accept": "image/png"},
    {"host": "evil.example"},
    {"origin": "http://evil.example"},
    {"content-encoding": "gzip"},
    {"anthropic-version": "1"},
    {"expect": "100-continue"},
    {"x-big": "x" * 70_000},
)


@pytest.fixture(scope="module")
def pool(port: int) -> Iterator[Pool]:
    with running_pool(port, {"models": MODELS, "max_body_mb": 1}) as pool:
        yield pool
        pool.check()


def still_answers(pool: Pool) -> None:
    answer = httpx.post(
        f"{pool.url}/v1/chat/completions", json={"model": "m", "messages": CHAT["messages"]}, timeout=30
    )
    assert answer.json()["choices"][0]["message"]["content"] == "m:0 m:1 "
    pool.wait(lambda ledger: ledger["leases"] == 0 and ledger["queued"] == 0)


def complaint(status: int, text: str) -> str | None:
    if status >= 500:
        return f"status {status}"
    if "Traceback" in text or 'File "/' in text:
        return "a traceback"
    if status >= 400 and not any(key in json.loads(text) for key in ("error", "detail")):
        return "no error in the body"
    return None


async def test_bad_bodies_are_refused_and_nothing_breaks(pool: Pool):
    made = list(bodies())
    assert len(made) >= 400
    wrong: list[str] = []
    gate = asyncio.Semaphore(16)
    async with httpx.AsyncClient(base_url=pool.url, timeout=60) as http:

        async def send(route: str, body: bytes) -> int:
            async with gate:
                answer = await http.post(route, content=body, headers={"content-type": "application/json"})
            if (why := complaint(answer.status_code, answer.text)) is not None:
                wrong.append(f"{route} {body[:300]!r}: {why}: {answer.text[:300]}")
            return answer.status_code

        statuses = await asyncio.gather(*(send(route, body) for route, body in made))
    assert not wrong, "\n".join(wrong[:20])
    assert sum(status >= 400 for status in statuses) > len(made) // 2
    await asyncio.to_thread(still_answers, pool)


async def test_bad_headers_are_refused_and_nothing_breaks(pool: Pool):
    wrong = []
    async with httpx.AsyncClient(base_url=pool.url, timeout=30) as http:
        for route, body in FAMILIES.items():
            for headers in HEADERS:
                sent = {"content-type": "application/json", **headers}
                answer = await http.post(route, content=json.dumps(body).encode(), headers=sent)
                is_json = answer.headers.get("content-type", "").startswith("application/json")
                why = complaint(answer.status_code, answer.text if is_json else "{}") if is_json else None
                if answer.status_code >= 500 or why is not None:
                    wrong.append(f"{route} {str(headers)[:200]}: {answer.status_code}: {answer.text[:200]}")
    assert not wrong, "\n".join(wrong[:20])
    await asyncio.to_thread(still_answers, pool)


def test_too_large_a_body_is_refused_before_it_is_read(pool: Pool):
    for route in FAMILIES:
        answer = httpx.post(f"{pool.url}{route}", content=b"x" * (2**20 + 1), timeout=30)
        assert answer.status_code == 413, (route, answer.text)
    still_answers(pool)


def test_slow_and_broken_senders_hold_up_nobody(pool: Pool):
    host, _, port = pool.url.removeprefix("http://").partition(":")

    def connect() -> socket.socket:
        return socket.create_connection((host, int(port)), timeout=10)

    slow = [connect() for _ in range(60)]
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    for index, each in enumerate(slow):
        # Half of them are slow with their headers, the others with the body that they announce.
        each.sendall(head if index % 2 else head + b"Content-Length: 500\r\n\r\n{")
    for _ in range(5):
        time.sleep(0.1)
        for index, each in enumerate(slow):
            each.sendall(b"X-A: b\r\n" if index % 2 else b" ")
        assert pool.ledger()["leases"] == 0
    still_answers(pool)
    for each in slow:
        each.close()
    for broken in (
        b"\x16\x03\x01",
        b"GET",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: x\r\n\r\n",
    ):
        with connect() as each:
            each.sendall(broken)
    still_answers(pool)
