"""llm-comply against a pool with a real model: what it checks of Responses, chat and Messages.

It cannot pass whole: the model has no eyes, so an image is refused with 400; and `response.metrics`, which streams of
Responses have here, is in none of its lists. Everything else must pass.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.agents.clients import PYTHON
from tests.pool import Pool, running_pool, smollm2

OWN_EVENT = "unknown SSE event type: response.metrics"


@pytest.fixture(scope="module")
def pool(port: int) -> Iterator[Pool]:
    # An answer that the context cuts off counts as a failure, and a model so small can be long-winded.
    models = {"smol": smollm2(num_cpus=0, target_inflight=1, gguf_n_ctx=4096)}
    with running_pool(port, {"models": models}) as pool:
        yield pool


@pytest.mark.parametrize(
    ("kind", "count", "failing"),
    [
        ("open-responses", 13, "image-input"),
        ("openai-chat", 9, "chat-image-input"),
        ("anthropic", 9, "anth-image-input"),
    ],
)
def test_a_family_complies(pool: Pool, tmp_path: Path, kind: str, count: int, failing: str):
    command = [
        str(PYTHON / "llm-comply"),
        "run",
        "--base-url",
        f"{pool.url}/v1",
        "--api-key",
        "none",
        "--model",
        "smol",
    ]
    ran = subprocess.run(
        [*command, "--format", kind, "--json", "--timeout", "300", "--ignore", OWN_EVENT],
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    results = {each["id"]: each for each in json.loads(ran.stdout)["results"]}
    assert len(results) == count
    assert [each for each in results.values() if each["status"] == "failed" and each["id"] != failing] == []
    assert "HTTP 400" in results[failing]["errors"][0]
