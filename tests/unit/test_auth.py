"""Who may come in: keys, and without keys this machine and its own pages only."""

from __future__ import annotations

import hashlib
import json
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse

from app.auth import MAX_HEADERS, ApiKeyMiddleware, caller_of
from cluster.config import Caller, PoolConfig, load_config


def pool(api: tuple[Any, ...] = (), admin: tuple[Any, ...] = ()) -> PoolConfig:
    def stored(key: Any) -> Any:
        return sha256(key) if isinstance(key, str) else {**key, "key": sha256(key["key"])}

    return load_config({"api_keys": [*map(stored, api)], "admin_keys": [*map(stored, admin)]}, environ={})


def sha256(key: str) -> str:
    return f"sha256:{hashlib.sha256(key.encode()).hexdigest()}"


async def inside(scope: Any, receive: Any, send: Any) -> None:
    await JSONResponse(caller_of(Request(scope)))(scope, receive, send)


async def knock(
    path: str,
    headers: dict[str, str] | None = None,
    *,
    config: PoolConfig | None = None,
    method: str = "GET",
    root: str = "",
    client: str = "127.0.0.1",
) -> httpx.Response:
    gateway = cast(Any, SimpleNamespace(config=config or pool()))
    transport = httpx.ASGITransport(ApiKeyMiddleware(inside, gateway), root_path=root, client=(client, 5))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as http:
        return await http.request(method, path, headers=headers)


def bearer(key: str | None) -> dict[str, str]:
    return {} if key is None else {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize(
    ("path", "key", "api", "admin", "status"),
    [
        ("/v1/models", None, (), (), 200),
        ("/v1/models", "any", (), (), 200),
        ("/v1/models", None, ("a",), (), 401),
        ("/v1/models", "a", ("a",), (), 200),
        ("/v1/models", "b", ("a",), (), 401),
        ("/v1/models", "c", ("a", "c"), (), 200),
        ("/health", None, ("a",), ("o",), 200),
        ("/ready", None, ("a",), ("o",), 200),
        ("/v1/admin/models", "a", ("a",), (), 200),
        ("/v1/admin/models", "a", ("a",), ("o",), 403),
        ("/v1/admin/models", None, ("a",), ("o",), 401),
        ("/v1/admin/models", "o", ("a",), ("o",), 200),
        ("/admin/models", "a", ("a",), ("o",), 403),
        ("/admin", None, (), ("o",), 401),
        ("/v1/models", "o", ("a",), ("o",), 200),
        ("/v1/models", None, (), ("o",), 200),
        ("/admin/models", "o", (), ("o",), 200),
        ("/administrators", None, (), ("o",), 200),
    ],
)
async def test_who_may_come_in(path, key, api, admin, status):
    assert (await knock(path, bearer(key), config=pool(api, admin))).status_code == status


async def test_a_prefix_of_the_application_opens_no_back_door():
    assert (await knock("/pool/v1/admin/models", config=pool(admin=("o",)), root="/pool")).status_code == 401


async def test_a_key_may_stand_in_either_header():
    config = pool(("a",))
    assert (await knock("/v1/models", {"X-Api-Key": "a"}, config=config)).status_code == 200
    assert (await knock("/v1/models", {"X-Api-Key": "a", **bearer("none")}, config=config)).status_code == 200
    assert (await knock("/v1/models", {"Authorization": "Basic a"}, config=config)).status_code == 401


async def test_the_callers_name_and_what_it_may():
    config = pool(({"name": "bulk", "key": "b", "models": ["m"], "max_priority": "low"}, "a"), ("o",))

    async def caller(key: str | None, config: PoolConfig = config, path: str = "/v1/models") -> Caller:
        principal, may_pin, models, best = (await knock(path, bearer(key), config=config)).json()
        return Caller(principal, may_pin, tuple(models), best)

    assert await caller("b") == Caller("bulk", False, ("m",), 3)
    assert await caller("a") == Caller(f"key-{sha256('a')[7:15]}", False)
    assert await caller("o") == Caller(f"admin-{sha256('o')[7:15]}", True)
    assert await caller(None, path="/health") == Caller("anonymous", False)
    assert await caller(None, pool()) == Caller("anonymous", True)
    assert await caller(None, pool(admin=("o",))) == Caller("anonymous", False)


@pytest.mark.parametrize(
    ("client", "status"),
    [
        ("127.0.0.1", 200),
        ("127.8.9.1", 200),
        ("::1", 200),
        ("::ffff:127.0.0.1", 200),
        ("10.0.0.1", 403),
        ("::ffff:10.0.0.1", 403),
        ("fe80::1", 403),
        ("", 403),
    ],
)
async def test_without_keys_only_this_machine(client, status):
    for path in ("/v1/models", "/health"):
        assert (await knock(path, client=client)).status_code == status
    assert (await knock("/v1/models", bearer("a"), config=pool(("a",)), client=client)).status_code == 200
    with_admin = pool(admin=("o",))
    assert (await knock("/v1/models", config=with_admin, client=client)).status_code == status
    assert (await knock("/v1/models", bearer("o"), config=with_admin, client=client)).status_code == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8000", 200),
        ("LOCALHOST", 200),
        ("127.0.0.1:8000", 200),
        ("[::1]:8000", 200),
        ("evil.example:8000", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost.evil.example", 403),
        ("192.168.0.5:8000", 403),
        ("[::2]:8000", 403),
    ],
)
async def test_a_name_that_was_bound_to_this_machine_is_refused(host, status):
    for method in ("GET", "POST"):
        assert (await knock("/v1/models", {"Host": host}, method=method)).status_code == status
        assert (await knock("/x", {"Host": host, **bearer("a")}, config=pool(("a",)), method=method)).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Origin": "http://127.0.0.1:8000"}, 200),
        ({"Origin": "https://127.0.0.1:8000"}, 200),
        ({"Origin": "http://127.0.0.1:3000"}, 403),
        ({"Origin": "http://localhost:8000"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
        ({"Sec-Fetch-Site": "none"}, 200),
    ],
)
async def test_another_sites_page_may_change_nothing(headers, status):
    for method in ("POST", "PATCH", "DELETE", "PUT"):
        for path in ("/v1/chat/completions", "/v1/admin/models/m/load", "/no/such/route"):
            answer = await knock(path, headers, method=method)
            assert answer.status_code == status
            if status == 403:
                assert answer.json()["error"]["code"] == "FORBIDDEN"
                assert ("detail" in answer.json()) is path.startswith("/v1/admin")
    assert (await knock("/v1/models", headers)).status_code == 200
    assert (await knock("/x", {**headers, **bearer("a")}, config=pool(("a",)), method="POST")).status_code == 200


async def test_refusals_have_the_contracts_shape_and_no_key():
    refused = await knock("/v1/admin/models", bearer("guess"), config=pool(("a",), ("o",)))
    assert refused.json()["detail"] == {"code": "unauthorized", "message": refused.json()["error"]["message"]}
    assert refused.headers["www-authenticate"] == "Bearer"
    assert "guess" not in refused.text
    plain = await knock("/v1/models", config=pool(("a",)))
    assert plain.json()["error"]["code"] == "UNAUTHORIZED"
    assert "detail" not in plain.json()


async def test_what_is_too_long_is_refused():
    assert (await knock("/" + "x" * 9000)).status_code == 431
    assert (await knock("/", {"X-Long": "x" * MAX_HEADERS})).status_code == 431


async def test_new_keys_hold_from_the_next_request_on():
    gateway = cast(Any, SimpleNamespace(config=pool()))
    transport = httpx.ASGITransport(ApiKeyMiddleware(inside, gateway))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
        assert (await http.get("/")).status_code == 200
        gateway.config = pool(("a",))
        assert (await http.get("/")).status_code == 401
        assert json.loads((await http.get("/", headers=bearer("a"))).text)[0].startswith("key-")
