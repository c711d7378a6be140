"""The models of a snapshot as backends of `/v1/status`."""

from __future__ import annotations

from app.routes.service import _model, _server
from cluster.ledger.snapshot import ModelRow, ReplicaRow, ServerRow, Snapshot


def test_a_model_is_as_old_as_its_oldest_replica_that_serves():
    rows = tuple(
        ReplicaRow("m", uid, state, 1, 0, "n", 0.0, pid=pid, started_at=at)
        for uid, state, pid, at in (("x", "DRAINING", 1, 10.0), ("y", "READY", 2, 60.0), ("z", "READY", 3, 80.0))
    )
    models = {"m": ModelRow(ready=2, state="loaded", last_arrival=4.0), "n": ModelRow(state="failed", last_error="no")}
    ledger = Snapshot("e", replicas=rows, models=models, now=9.0, time=100.0)
    row = _model("m", ledger)
    assert (row["is_running"], row["pid"], row["uptime"], row["last_request_time"]) == (True, 2, 40.0, 95.0)
    row = _model("n", ledger)
    assert (row["is_running"], row["is_healthy"], row["error"]) == (False, False, "no")
    assert (row["pid"], row["uptime"], row["last_request_time"]) == (None, None, None)


def test_a_server_is_a_backend_too():
    row = _server(ServerRow("http://one", last_refresh_error="refused"))
    assert (row["url"], row["is_healthy"], row["error"]) == ("http://one", False, "refused")
