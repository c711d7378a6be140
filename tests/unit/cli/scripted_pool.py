"""A pool that answers as a test says, and the command line that talks to it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
from click.testing import CliRunner, Result

from app.cli import cli

Route = Callable[[httpx.Request], httpx.Response]


class ScriptedPool:
    """Routes by method and path. A route is its JSON, or a function of the request; what was asked is kept."""

    def __init__(self, **routes: Any) -> None:
        self.routes: dict[str, Any] = {}
        self.asked: list[httpx.Request] = []

    def on(self, route: str, answer: Any) -> None:
        """`on("GET /v1/models", {...})`."""
        self.routes[route] = answer

    def handle(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request)
        answer = self.routes.get(f"{request.method} {request.url.path}")
        if answer is None:
            return error(404, f"{request.url.path}: Not Found")
        return answer(request) if callable(answer) else httpx.Response(200, json=answer)

    def run(self, *args: str, **options: Any) -> Result:
        """The command with these arguments; its output is that of a pipe."""
        transport = httpx.MockTransport(self.handle)
        return CliRunner().invoke(cli, args, obj=transport, prog_name="slotpool", **options)


def error(status: int, message: str) -> httpx.Response:
    """An error as the pool answers it."""
    return httpx.Response(status, json={"error": {"message": message, "type": "x", "param": None, "code": "X"}})


def stream(*parts: str) -> Route:
    """A streamed answer of these parts."""
    return lambda request: httpx.Response(200, text="".join(parts), headers={"content-type": "text/event-stream"})


def event(kind: str, data: dict[str, Any], identity: str = "") -> str:
    """One server-sent event."""
    return (f"id: {identity}\n" if identity else "") + f"event: {kind}\ndata: {json.dumps(data)}\n\n"


def change(version: int, kind: str, model: str | None, **data: Any) -> dict[str, Any]:
    """An entry of the change log."""
    return {"version": version, "time": 1.0 * version, "kind": kind, "model": model, "replica": "u", "data": data}


def log_of(*entries: dict[str, Any], begin: int | None = None) -> Route:
    """The route of events: a snapshot for who begins, and the entries for who goes on behind something.

    The snapshot is that behind the last entry, or behind entry `begin`.
    """

    def answer(request: httpx.Request) -> httpx.Response:
        seen = request.headers.get("last-event-id")
        if seen is None:
            last = entries[-1]["version"] if entries else 0
            text = event("snapshot", {}, f"e-{last if begin is None else begin}")
        else:
            after = int(seen.rpartition("-")[2])
            later = [each for each in entries if each["version"] > after]
            text = "".join(event(each["kind"], each, f"e-{each['version']}") for each in later)
        return httpx.Response(200, text=": nothing happened\n\n" + text)

    return answer


def status(**models: dict[str, Any]) -> dict[str, Any]:
    """The answer of `/v1/status` with these models, as the ledger shows them."""
    from dataclasses import asdict

    from cluster.ledger.snapshot import ModelRow, ReplicaRow, Snapshot, as_dict

    rows = {name: ModelRow(**fields) for name, fields in models.items()}
    replicas = tuple(
        ReplicaRow(name, f"{name}-u", "READY", 8, row.leases, "0123456789abcdef", 90.0, pid=7, started_at=1.0)
        for name, row in rows.items()
        if row.state == "loaded"
    )
    snapshot = Snapshot("e", models=rows, replicas=replicas, now=100.0, time=1000.0)
    assert asdict(snapshot)["epoch"] == "e"
    return {"execution_mode": "gpu", "backends": {}, "ledger": as_dict(snapshot)}
