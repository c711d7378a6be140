"""How many replicas the ledger wants in each Serve application, as one process knows it: Serve's controller.

One daemon thread parks in the ledger until the counts change. Asking for a count never waits and never raises.
"""

from __future__ import annotations

import threading
import time
from functools import cache
from typing import Any, NamedTuple

import ray

from cluster import effects
from cluster.applications import application_of

#: Pause before the ledger is looked for again, in seconds.
RETRY_S = 0.2
#: How long a call parks in the ledger, and what its answer may take beyond that, in seconds. Short, since nothing
#: starts while a call hangs.
PARKED_S = 10.0
ANSWER_S = 5.0


class Counts(NamedTuple):
    """What the ledger wants: replicas by model, and the application in which each model's replicas live."""

    replicas: dict[str, int]
    applications: dict[str, str]


class Follower:
    """Keeps `counts` as new as the ledger's. The last ones stay in force while there is no ledger."""

    def __init__(self) -> None:
        self.counts: Counts | None = None

    def start(self) -> None:
        """Follow the ledger for the rest of this process's life."""
        threading.Thread(target=self._run, name="slotpool-follower", daemon=True).start()

    def wanted(self, application: str, model: str) -> int | None:
        """The number of replicas of a model in an application; None without word from any ledger."""
        counts = self.counts
        if counts is None:
            return None
        return counts.replicas.get(model, 0) if counts.applications.get(model) == application else 0

    def _run(self) -> None:
        while True:
            try:
                self.follow(effects.find_ledger())
            except Exception:
                # Whatever happened to the ledger: it will be back, or another will be there.
                time.sleep(RETRY_S)

    def follow(self, ledger: Any) -> None:
        """Take over each change of the counts. Raises when the ledger is lost."""
        version = -1
        while True:
            version, replicas = ray.get(ledger.desired.remote(version, PARKED_S), timeout=PARKED_S + ANSWER_S)
            # Only now: a model has its application before its first replica is wanted.
            configuration = ray.get(ledger.config.remote((0.0, -1)), timeout=ANSWER_S)
            applications = {model: application_of(configuration, model) for model in configuration.pool.models}
            # A model that was removed while its replicas drain stays where it was.
            former = self.counts.applications if self.counts else {}
            leaving = {model: former[model] for model in replicas if model in former and model not in applications}
            self.counts = Counts(replicas, {**leaving, **applications})


@cache
def follower() -> Follower:
    """The one follower of this process, which begins to follow when it is first asked for."""
    one = Follower()
    one.start()
    return one
