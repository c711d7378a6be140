"""What became of one request, for whoever renders its answer."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from cluster.errors import PoolError
from deployments.engines.chat.metrics import metrics_object
from deployments.engines.protocol import Call, Report


@dataclass(slots=True)
class RunInfo:
    """Filled in by the gateway while the request runs: the call that was made, and its report once that has ended.

    `failure` is the error that a stream ended with after something of it had been sent. `status` and `headers` are the
    engine's own, once something of its answer is there, and `devices` those of its node that the engine runs on.
    """

    arrived: float = field(default_factory=time.monotonic)
    call: Call | None = None
    report: Report = field(default_factory=Report)
    failure: PoolError | None = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    devices: tuple[int, ...] = ()

    @property
    def model(self) -> str | None:
        """The model that answers, which may be another than was asked for; None before there is one."""
        return None if self.call is None else self.call.json.get("model")

    def metrics(self) -> dict[str, Any]:
        """The `metrics` object of CONTRACT section 2, with this process's own time around the engine's."""
        metrics = metrics_object(self.call or Call("", {}, ""), self.report)
        metrics["pool_total_wall_ms"] = round((time.monotonic() - self.arrived) * 1e3, 3)
        return metrics
