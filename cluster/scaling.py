"""Serve's application-level autoscaling policy: replica counts follow the ledger.

Serve calls the policy ten times a second inside its controller's event loop, so the call must never block and never
raise. A daemon thread parks in the ledger until the counts change; the call itself reads what the thread left.

A swap takes about six passes of that loop, one after another: the policy is asked, a replica is told to stop, seen to
have stopped, the other one is told to start, seen to have a process, told to initialise. So the loop runs faster from
a change on until all that should run does.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import ray

from cluster import effects

#: Pause before the ledger is looked for again, in seconds.
RETRY_S = 0.2

#: For how long after a change of a count the controller hurries: enough for a stop, in seconds,
HURRY_S = 0.3
#: and at most as long as this where a replica takes longer to start: its process needs the CPU more than the loop,
#: which takes most of a core in its hurry.
LONGEST_HURRY_S = 1.0


class LedgerPolicy:
    """Named as `cluster.scaling:LedgerPolicy` in `serve_config.yaml`; made once, in Serve's controller."""

    def __init__(self, **_: Any) -> None:
        self._desired: dict[str, int] | None = None
        self._changed_at = -LONGEST_HURRY_S
        threading.Thread(target=self._follow, name="slotpool-policy", daemon=True).start()

    def __call__(self, contexts: dict[Any, Any]) -> tuple[dict[Any, int], dict[Any, Any]]:
        """The replica count of each deployment that should change; without word from a ledger, none.

        A deployment that is as it should be must not be named: Serve starts a replica of a named deployment that
        has none when its own, older figures still count a request there, whatever the policy says.
        """
        desired = self._desired
        if desired is None:
            return {}, {}
        wanted = {key: desired.get(key.name, 0) for key in contexts}
        changes = {key: count for key, count in wanted.items() if count != contexts[key].target_num_replicas}
        now = time.monotonic()
        if changes:
            self._changed_at = now
        settled = all(each.current_num_replicas == each.target_num_replicas for each in contexts.values())
        effects.pace_controller(hurry=now < self._changed_at + (HURRY_S if settled else LONGEST_HURRY_S))
        return changes, {}

    def _follow(self) -> None:
        version = -1
        ledger = None
        while True:
            try:
                if ledger is None:
                    ledger, version = effects.find_ledger(), -1
                version, desired = ray.get(ledger.desired.remote(version), timeout=120.0)
                self._desired = {effects.deployment_name(model): count for model, count in desired.items()}
            except Exception:
                # Whatever happened to the ledger, the last counts stay in force until it is back.
                ledger = None
                time.sleep(RETRY_S)
