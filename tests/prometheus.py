"""A real Prometheus for tests, where it is installed (Debian: `prometheus`)."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import yaml

from cluster.sockets import free_port


def is_installed() -> bool:
    """Whether there is one on this machine."""
    return shutil.which("prometheus") is not None


@contextlib.contextmanager
def prometheus(target: str, folder: Path, rules: Path | None = None) -> Iterator[httpx.Client]:
    """A Prometheus that scrapes one target, and looks at its rules, every second; a client of its API."""
    port = free_port()
    config = folder / "prometheus.yml"
    document = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [] if rules is None else [str(rules.resolve())],
        "scrape_configs": [{"job_name": "slotpool", "static_configs": [{"targets": [target]}]}],
    }
    config.write_text(yaml.safe_dump(document))
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={config}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=log,
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}/api/v1", timeout=30) as client:
            yield client
    finally:
        process.terminate()
        process.wait(30)


def query(api: httpx.Client, expression: str) -> list[dict[str, Any]]:
    """What an expression finds now: label values and a value each."""
    answer = api.get("/query", params={"query": expression}).raise_for_status()
    return list(answer.json()["data"]["result"])


def until(look: Callable[[], Any], timeout_s: float = 60.0) -> Any:
    """What `look` finds once that is something; an API that is not up yet has nothing."""
    deadline = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(httpx.HTTPError):
            if found := look():
                return found
        assert time.monotonic() < deadline, "Prometheus has not seen it in time"
        time.sleep(0.1)
