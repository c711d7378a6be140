"""The OpenAPI document is true: requests made from it meet no 5xx, no status and no body that it does not tell."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.pool import Pool, fake, running_pool

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
#: Streams without an end.
ENDLESS = {"/v1/admin/events", "/admin/events", "/models/sse"}
MODELS = {"m": {**fake(tokens=2, tokens_per_s=100_000), "target_inflight": 16}}


@pytest.fixture(scope="module")
def pool(port: int) -> Iterator[Pool]:
    with running_pool(port, {"models": MODELS, "max_body_mb": 1}) as pool:
        yield pool
        pool.check()


@pytest.fixture(scope="module")
def document(pool: Pool) -> Any:
    """The document with the one model's id wherever a request names a model, so that most of them find it."""
    raw = httpx.get(f"{pool.url}/openapi.json").json()
    raw["paths"] = {path: methods for path, methods in raw["paths"].items() if path not in ENDLESS}
    for schema in raw["components"]["schemas"].values():
        for name in ("model", "model_id"):
            if name in schema.get("properties", {}):
                schema["properties"][name] = {"enum": ["m"]}
                schema["required"] = sorted({*schema.get("required", ()), name})
    return schemathesis.openapi.from_dict(copy.deepcopy(raw))


schema = schemathesis.pytest.from_fixture("document")


@schema.parametrize()
@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_every_operation_answers_as_documented(pool: Pool, case: schemathesis.Case):
    case.call_and_validate(base_url=pool.url, checks=CHECKS, timeout=20)
