"""The commands of `slotpool`, as programs, against a pool over real Serve."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.pool import Pool, fake, running_pool

ROOT = Path(__file__).parents[2]
ADMIN_KEY = "never-shown"
COMMAND = (sys.executable, "-c", "from app.cli import main; main()")
MODELS = {
    "a": {**fake(load_s=0.3, tokens_per_s=200, tokens=12), "num_gpus": 1, "target_inflight": 2},
    "b": {**fake(load_s=0.3, tokens_per_s=200, tokens=12), "num_gpus": 1, "target_inflight": 2},
}


@pytest.fixture(scope="module")
def pool(port: int) -> Iterator[Pool]:
    with running_pool(
        port, {"models": MODELS, "admin_keys": [f"sha256:{hashlib.sha256(ADMIN_KEY.encode()).hexdigest()}"]}
    ) as pool:
        yield pool
        pool.check()


def environment(pool: Pool) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "SLOTPOOL_URL": pool.url, "SLOTPOOL_API_KEY": ADMIN_KEY}


def slotpool(pool: Pool, *args: str, code: int = 0) -> str:
    """What a command prints, once it has ended with that status."""
    ran = subprocess.run(
        [*COMMAND, *args], env=environment(pool), capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.returncode == code, ran.stderr
    assert "Traceback" not in ran.stderr
    assert ADMIN_KEY not in ran.stdout + ran.stderr
    return ran.stdout + ran.stderr


def as_json(pool: Pool, *args: str) -> Any:
    return json.loads(slotpool(pool, *args, "--json"))


def test_an_operators_day(pool: Pool):
    """Everything that an operator types, one after the other, while he follows what happens in another window."""
    follower = subprocess.Popen(
        [*COMMAND, "events", "--json"], env=environment(pool), stdout=subprocess.PIPE, text=True, bufsize=1
    )
    told: list[dict[str, Any]] = []
    assert follower.stdout is not None
    reader = threading.Thread(target=lambda: told.extend(map(json.loads, follower.stdout or ())), daemon=True)
    reader.start()
    try:
        assert {row["id"]: row["status"] for row in as_json(pool, "models")} == {"a": "unloaded", "b": "unloaded"}
        assert "a is loaded, with 1 replica(s)." in slotpool(pool, "load", "a")
        assert [row["state"] for row in as_json(pool, "ps") if row["model"] == "a"] == ["READY"]
        assert slotpool(pool, "chat", "a", "-m", "Hello", "--max-tokens", "3").strip() == "a:0 a:1 a:2"
        headers = {"X-Request-Id": "the-visitor"}
        body = {"model": "b", "messages": [{"role": "user", "content": "x"}]}
        assert httpx.post(f"{pool.url}/v1/chat/completions", json=body, headers=headers, timeout=60).status_code == 200
        because = slotpool(pool, "why", "the-visitor")
        assert (
            "b gets the room of 1 replica, because request the-visitor needs the room, and what was there was idle."
            in because
        )
        assert "a takes nothing new and ends what runs" in because
        assert slotpool(pool, "why", "b").startswith("b is loaded.\n")
        assert "b is pinned." in slotpool(pool, "pin", "b")
        assert as_json(pool, "status")["ledger"]["models"]["b"]["pinned"] is True
        slotpool(pool, "pin", "--off", "b")
        assert "b is unloaded." in slotpool(pool, "unload", "b")
        assert "the model 'c' does not exist" in slotpool(pool, "load", "c", code=1)
        assert "b gets the room" in slotpool(pool, "events", "--no-follow", "--model", "b")
    finally:
        follower.terminate()
        follower.wait(10)
    reader.join(10)
    assert {"swap", "replica", "model"} <= {change["kind"] for change in told}


def test_a_load_test_of_the_pool(pool: Pool):
    result = as_json(pool, "bench", "--model", "a", "--requests", "12", "--concurrency", "4", "--max-tokens", "5")
    assert (result["served"], result["failed"], result["output_tokens"]) == (12, 0, 60)
    figures = {row["figure"]: row for row in result["figures"]}
    assert 0 < figures["TTFT"]["p50"] <= figures["end to end"]["p50"]


def test_without_a_key_an_operators_command_is_refused(pool: Pool):
    ran = subprocess.run(
        [*COMMAND, "load", "a"],
        env={**environment(pool), "SLOTPOOL_API_KEY": ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == 1
    assert ran.stderr.splitlines()[-1] == (
        "slotpool: a valid admin key is required: Authorization: Bearer <key> "
        "(set SLOTPOOL_API_KEY, or name a file with --key-file)"
    )
