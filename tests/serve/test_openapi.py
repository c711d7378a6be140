"""The OpenAPI document is true: requests made from it meet no 5xx, no status and no body that it does not tell."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from app.http import build_http
from app.routes import ollama
from cluster.config import PoolConfig
from deployments.limits import Limits
from tests.pool import Pool, fake, running_pool

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
#: Streams without an end.
ENDLESS = {"/v1/admin/events", "/admin/events", "/models/sse"}
NOT_DONE = {path for _, path in ollama.MANAGING}
#: Who gives the pool no time at all gets a true 504, and who asks for a book waits for one.
BOUNDED = {"timeout_s": [20], "max_tokens": [1, 2], "max_completion_tokens": [1, 2], "max_output_tokens": [1, 2]}
MODELS = {"m": {**fake(tokens=2, tokens_per_s=100_000), "target_inflight": 16}}


def operations() -> list[Any]:
    """What the document has, with the one model's id wherever a body names a model, so that most of them find it."""
    gateway: Any = SimpleNamespace(config=PoolConfig(), limits=Limits())
    document = copy.deepcopy(build_http(gateway).openapi())
    for path in ENDLESS:
        document["paths"].pop(path, None)
    for schema in document["components"]["schemas"].values():
        properties = schema.get("properties", {})
        properties |= {name: {"enum": values} for name, values in BOUNDED.items() if name in properties}
        for name in ("model", "model_id"):
            if name in properties:
                properties[name] = {"enum": ["m"]}
                schema["required"] = sorted({*schema.get("required", ()), name})
    return [each.ok() for each in schemathesis.openapi.from_dict(document).get_all_operations()]


@pytest.fixture(scope="module")
def pool(port: int) -> Iterator[Pool]:
    with running_pool(port, {"models": MODELS, "max_body_mb": 1}) as pool:
        yield pool
        pool.check()


@pytest.mark.parametrize("operation", operations(), ids=lambda operation: operation.label)
def test_every_operation_answers_as_documented(pool: Pool, operation: Any):
    # What the pool does not do by design answers 501 and says so.
    checks = [check for check in CHECKS if check is not not_a_server_error or operation.path not in NOT_DONE]

    @settings(max_examples=8, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy())
    def run(case: schemathesis.Case) -> None:
        case.call_and_validate(base_url=pool.url, checks=checks, timeout=20)

    run()
